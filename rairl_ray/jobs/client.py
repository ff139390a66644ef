"""A cluster's Jobs API: one address, its token and certificates, what it runs, and one line when it says no."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rairl_ray.actors.placement import Node, total_gpus
from rairl_ray.config.machine_rules import url_problem
from rairl_ray.errors import UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Ray's own; its client lets them win over a given address, ours does not."""
CERTIFICATE_VARIABLES = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
HEADERS_VARIABLE = "RAY_JOB_HEADERS"
CONNECT_SECONDS = 5.0
VERSION_SECONDS = 10.0
"""Deadline of the first answer."""
ANSWER_SECONDS = 30.0
UPLOAD_SECONDS = 600.0
_TOKEN_REMEDY = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to the cluster's token"


class ClusterError(UserError):
    """A cluster that cannot be reached, or that cannot run this."""


@dataclass(frozen=True)
class Cluster:
    """What a cluster is, as its own API says."""

    ray: str
    python: str
    nodes: tuple[Node, ...]
    """Those that are alive."""
    here: bool
    """Whether every node is this machine, so that paths mean the same there."""

    @property
    def gpus(self) -> int:
        return total_gpus(self.nodes)

    def describe(self) -> str:
        cpus = sum(node.resources.get("CPU", 0.0) for node in self.nodes)
        return (
            f"{len(self.nodes)} node(s), {cpus:g} CPUs, {self.gpus} GPUs, Ray {self.ray}, Python {self.python}"
        )


class Connection:
    """One Jobs API. Making it asks for the version: whatever is wrong is one line, within seconds."""

    def __init__(self, address: str | None = None, ca_file: str | None = None) -> None:
        """Connect.

        Args:
            address: http(s)://HOST:PORT; None takes RAY_API_SERVER_ADDRESS, RAY_ADDRESS or DEFAULT_ADDRESS.
            ca_file: certificates that https is checked against; None takes REQUESTS_CA_BUNDLE or SSL_CERT_FILE.

        Raises:
            ClusterError: no such scheme, nobody answers, a token that is missing or refused.
        """
        self.address = api_address(address)
        self.ca_file = ca_file
        verify = certificates(ca_file)
        reachable(self.address)
        with _one_line(self.address), _unset(ADDRESS_VARIABLES):
            self.jobs = _client(self.address, verify, _headers())

    def get(self, path: str) -> Any:
        """The JSON that the dashboard answers."""
        with _one_line(self.address):
            response = self.jobs._do_request("GET", path)
            response.raise_for_status()
            return response.json()

    def cluster(self) -> Cluster:
        """Versions and nodes."""
        metadata = self.get("/api/v0/cluster_metadata")["data"]
        listed = self.get("/api/v0/nodes?detail=1&limit=10000")["data"]["result"]["result"]
        summary = self.get("/nodes?view=summary")["data"]["summary"]
        raylets = [node.get("raylet", {}) for node in summary]
        alive = [raylet for raylet in raylets if raylet.get("state") == "ALIVE"]
        ours = _own_addresses()
        return Cluster(
            ray=metadata["rayVersion"],
            python=metadata["pythonVersion"],
            nodes=tuple(
                Node(node["resources_total"], node["labels"]) for node in listed if node["state"] == "ALIVE"
            ),
            here=bool(alive)
            and all(
                raylet.get("nodeManagerHostname") == socket.gethostname()
                and raylet.get("nodeManagerAddress") in ours
                for raylet in alive
            ),
        )

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Errors of the Jobs API as one line."""
        with _one_line(self.address):
            yield

    def options(self) -> str:
        """What a command needs to reach the same cluster, with a space before it."""
        given = "" if self.address == DEFAULT_ADDRESS else f" --address {self.address}"
        return given + (f" --ca-file {self.ca_file}" if self.ca_file else "")


def check_versions(cluster: Cluster, address: str) -> None:
    """Refuse a cluster of another Ray, or another minor version of Python: pickles would not be read there."""
    import ray

    if cluster.ray != ray.__version__:
        raise ClusterError(
            f"{address}: the cluster runs Ray {cluster.ray} and this environment Ray {ray.__version__}; "
            "submit from "
            "an environment of the cluster's lock, or start the cluster from this one's"
        )
    ours = platform.python_version()
    if cluster.python.split(".")[:2] != ours.split(".")[:2]:
        raise ClusterError(
            f"{address}: the cluster runs Python {cluster.python} and this environment Python {ours}; use one "
            "minor version on both sides"
        )


def api_address(given: str | None) -> str:
    """The address as http(s)://HOST:PORT. Raises ClusterError for anything else."""
    text = given or next(
        (os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), DEFAULT_ADDRESS
    )
    if text in ("auto", "local"):
        text = DEFAULT_ADDRESS
    url = text if "://" in text else f"http://{text}"
    remedy = "write http://HOST:8265 or https://HOST (the dashboard's address)"
    if url_problem(url):
        raise ClusterError(f"--address {text}: is no address; {remedy}")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ClusterError(f"--address {text}: scheme {parts.scheme}:// is not supported; {remedy}")
    if parts.username or parts.password:
        raise ClusterError(f"--address: holds a user or password, which would be shown; {remedy}")
    if not parts.hostname or parts.query or parts.fragment:
        raise ClusterError(f"--address {text}: names no host; {remedy}")
    if parts.port == 6379:
        raise ClusterError(
            f"--address {text}: port 6379 is where nodes join; jobs go to the dashboard: {remedy}"
        )
    return url.rstrip("/")


def certificates(ca_file: str | None) -> str | bool:
    """What https is verified against: a file or folder, or True for the system's."""
    path = ca_file or next((os.environ[name] for name in CERTIFICATE_VARIABLES if os.environ.get(name)), None)
    if path is None:
        return True
    if not os.path.exists(path):
        raise ClusterError(
            f"--ca-file {path}: no such file; give the certificates that the cluster's is signed by"
        )
    return path


def reachable(address: str) -> None:
    """Refuse an address where no port is open; Ray's client would wait for minutes."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"{address}: nobody answers there ({error.strerror or error}); check the address, or start a "
            "cluster "
            "with `ray start --head`"
        ) from None


def _client(address: str, verify: str | bool, headers: dict[str, str]) -> Any:
    """Ray's client, with a deadline for each answer."""
    import logging

    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            answer = VERSION_SECONDS if endpoint == "/api/version" else ANSWER_SECONDS
            if options.get("data") is not None:
                answer = UPLOAD_SECONDS
            options.setdefault("timeout", (CONNECT_SECONDS, answer))
            return super()._do_request(method, endpoint, **options)

    for name in ("job.sdk", "dashboard_sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    logging.getLogger("ray._private.authentication.http_token_authentication").setLevel(logging.ERROR)
    return Client(address, headers=headers, verify=verify)


def _headers() -> dict[str, str]:
    text = os.environ.get(HEADERS_VARIABLE)
    if not text:
        return {}
    try:
        headers = json.loads(text)
        return {str(key): str(value) for key, value in headers.items()}
    except (ValueError, AttributeError):
        raise ClusterError(f'{HEADERS_VARIABLE}: is no JSON object; write {{"Name": "value"}}') from None


@contextmanager
def _one_line(address: str) -> Iterator[None]:
    """Whatever Ray's client raises as a ClusterError. No message repeats a token: Ray's do not."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except UserError:
        raise
    except AuthenticationError as error:
        missing = "required" in str(error)
        what = "asks for a token and none was given" if missing else "refuses the token"
        raise ClusterError(f"{address}: the cluster {what}; {_TOKEN_REMEDY}") from None
    except requests.exceptions.Timeout:
        raise ClusterError(f"{address}: no answer in time; is it Ray's dashboard, and is it well?") from None
    except (requests.exceptions.RequestException, ConnectionError) as error:
        # Ray's client turns the first request's SSLError into a plain ConnectionError.
        certificate = "SSL" in str(error.__context__) or "SSL" in str(error)
        remedy = (
            "no TLS there, or a certificate that is not trusted; name what it is signed by: --ca-file FILE"
            if certificate
            else "is it Ray's dashboard?"
        )
        raise ClusterError(f"{address}: no answer of Ray's Jobs API; {remedy}") from None
    except (aiohttp.ClientError, OSError) as error:
        raise ClusterError(f"{address}: the connection was lost ({type(error).__name__})") from None
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        text = " ".join(str(error).split()).split("Traceback")[0][:300]
        raise ClusterError(f"{address}: the Jobs API says: {text}") from error


@contextmanager
def _unset(names: tuple[str, ...]) -> Iterator[None]:
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _own_addresses() -> set[str]:
    import psutil

    return {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
