"""Starting a private Ray, and joining one that somebody else runs: token, address, one line of refusal."""

from __future__ import annotations

import os
import re
import socket
import sys
from functools import partial

import ray
from ray._private import ray_constants, services
from ray._private.authentication import authentication_token_setup
from ray._private.services import get_node_ip_address
from ray._private.state import available_resources_per_node
from ray.exceptions import AuthenticationError

from rairl_ray.actors.placement import Node
from rairl_ray.errors import PlacementError

LOOPBACK = ("127.0.0.1", "localhost")
REMEDY = "set RAY_AUTH_TOKEN_PATH to the file with its token (cluster/local.sh: source the env file it names)"
START = "start one with `cluster/local.sh up`, or leave the key out for a private one"
NO_TOKEN = "a driver without a token"
PROBE_SECONDS = 5.0
"""Deadline of a look at whether anything listens at an address."""

_REFUSED_TOKEN = re.compile(r"InvalidAuthToken|Unauthenticated|AuthenticationError|authentication token", re.I)
_NOT_FOUND = ("Could not find any running Ray instance", "Found multiple active Ray instances")


def start(namespace: str) -> None:
    """Start a Ray of this process's own, which ends with it.

    Its processes get process groups of their own: who ends a run often signals the whole group of its driver
    (`timeout`, `kill -- -GROUP`, a supervisor), and without Ray the driver could save nothing. On Linux the
    kernel ends them with the driver; elsewhere Ray does that by the group, so they stay in it.
    """
    genuine = services.ConsolePopen
    if sys.platform == "linux":
        services.ConsolePopen = partial(genuine, process_group=0)
    try:
        ray.init(
            address="local",
            namespace=namespace,
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False,
            num_cpus=os.cpu_count(),
        )
    finally:
        services.ConsolePopen = genuine


def join(address: str, namespace: str | None = None) -> None:
    """Connect this process to the running cluster at `address`, with the token that the environment names.

    Args:
        address: `HOST:PORT` of the head, or "auto".
        namespace: of named actors; None for Ray's own choice.

    Raises:
        PlacementError: nothing listens there, or the cluster refuses the token.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "//" not in host:
        why = refusal(host, int(port))
        if why:
            raise PlacementError(f"cluster.address={address}: no Ray cluster answers there ({why}); {START}")
        if host in LOOPBACK and refusal(get_node_ip_address(), int(port)):
            # Ray takes the machine's outer address for 127.0.0.1; here nothing listens there.
            ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
            # Ray shows no token to an address given by hand unless RAY_AUTH_MODE says so: the token in the home
            # folder may be meant for another cluster. One that the environment names is meant for this one.
            authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level="ERROR")
    except AuthenticationError as error:
        raise PlacementError(f"cluster.address={address}: {str(error).split('. ')[0]}; {REMEDY}") from None
    except ConnectionError as error:
        raise PlacementError(f"cluster.address={address}: {unjoined(error)}") from None


def present_nodes() -> list[Node]:
    """The living nodes of the cluster that this process has joined."""
    return [Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]


def free_nodes() -> dict[str, Node]:
    """Node id -> what is free there at this moment, of the living nodes of the joined cluster."""
    free = available_resources_per_node()
    return {
        node["NodeID"]: Node(free.get(node["NodeID"], {}), node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    }


def nodes_at(address: str) -> list[Node]:
    """The living nodes of a running cluster, joined for this look. Raises PlacementError as `join` does."""
    if "://" in address:
        raise PlacementError(
            f"--address {address}: is a dashboard's; give HOST:PORT of the head (port 6379, say), or ask the "
            "dashboard by `submit --dry-run`"
        )
    join(address)
    try:
        return present_nodes()
    finally:
        ray.shutdown()


def unjoined(error: ConnectionError) -> str:
    """Why Ray did not join a cluster, and the remedy: its token, none at that address, or what cannot be told.

    Ray tries for a while and then raises one error for all; what the head answered stands in that one's causes.
    """
    said, cause = [str(error)], error.__cause__ or error.__context__
    while cause is not None:
        said.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    if any(_REFUSED_TOKEN.search(text) for text in said):
        given = token_source()
        what = "asks for a token, and this is" if given.startswith(NO_TOKEN) else "does not accept"
        return f"the Ray cluster there {what} {given}; {REMEDY}"
    first = said[0].splitlines()[0]
    if first.startswith(_NOT_FOUND):
        return f"no Ray cluster was found ({first.split('. ')[0]}); {START}"
    # A port of another program and a head that hangs up look the same from here.
    return f"what listens there does not accept {token_source()} as a Ray cluster would ({first}); {REMEDY}"


def token_source() -> str:
    """Where this process has its token from, never the token."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() != "token":
        return f"{NO_TOKEN} (RAY_AUTH_MODE={mode})" if mode else NO_TOKEN
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "the token in RAY_AUTH_TOKEN"
    return f"the token in {os.environ.get('RAY_AUTH_TOKEN_PATH') or '~/.ray/auth_token'}"


def refusal(host: str, port: int) -> str:
    """Why no connection to this address is possible; empty where one is."""
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""
