"""Secrets of a job: named on the command line, sealed with the cluster's own token, opened on its nodes.

Ray keeps a job's `env_vars` in plain text: its API gives them to every client with a token (only browsers see
`<redacted>`), and its log and session files hold them. So what travels is a text that only holders of the
cluster's token can read, and those can run any code there anyway. Nodes open it in memory alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence

from rairl_ray.errors import UserError

SEALED = "RAIRL_SEALED_SECRETS"
"""Environment variable of the job that holds the sealed secrets."""
HOOK = "rairl_ray.jobs.secrets.open_sealed"
"""What every worker process of the job runs first."""
_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")


class SecretError(UserError):
    """A secret that is missing, or that would be seen."""


def take_secrets(names: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The named variables. Raises SecretError for one that is no name, missing or empty."""
    for name in names:
        if not _NAME.match(name):
            raise SecretError(
                "--secret: takes the name of an environment variable such as HF_TOKEN, never its value"
            )
        if not environment.get(name):
            raise SecretError(f"--secret {name}: this environment has no such variable; set it first")
    return {name: environment[name] for name in names}


def refuse_visible(arguments: Sequence[str], secrets: Mapping[str, str]) -> None:
    """Refuse a command line that shows a secret: Ray keeps it, and everybody can list it."""
    for argument in arguments:
        for name, value in secrets.items():
            if value in argument:
                raise SecretError(f"an argument holds the value of {name}; leave it out, --secret sends it")
        if re.search(r"://[^/\s:@]*:[^/\s@]+@", argument):
            raise SecretError(
                f"{argument.split('=')[0]}: the address holds a password, which job lists would show; give "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD by --secret"
            )


def seal(secrets: Mapping[str, str], token: str) -> str:
    """The secrets as one text that only the token opens."""
    from cryptography.fernet import Fernet

    return Fernet(_key(token)).encrypt(json.dumps(dict(secrets)).encode()).decode()


def open_with(sealed: str, token: str) -> dict[str, str]:
    """What `seal` closed. Raises SecretError for another token."""
    from cryptography.fernet import Fernet, InvalidToken

    try:
        return dict(json.loads(Fernet(_key(token)).decrypt(sealed.encode())))
    except InvalidToken:
        raise SecretError(
            "the job's secrets were sealed with another token than this node's; give all nodes one token"
        ) from None


def open_sealed() -> None:
    """Put the job's secrets into this process's environment; nothing where there are none."""
    sealed = os.environ.get(SEALED)
    if sealed:
        os.environ.update(open_with(sealed, cluster_token()))


def cluster_token() -> str:
    """The Ray token of this process. Raises SecretError where there is none."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    try:
        headers = get_auth_headers_if_auth_enabled({})
    except Exception:
        headers = {}
    token = next((str(value) for key, value in headers.items() if key.lower() == "authorization"), "")
    if not token:
        raise SecretError(
            "--secret needs Ray's token authentication (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH): its "
            "token "
            "seals the value; without it set the variable on the cluster's nodes instead"
        )
    return token.removeprefix("Bearer ").strip()


def _key(token: str) -> bytes:
    return base64.urlsafe_b64encode(hashlib.sha256(b"rairl job secrets\0" + token.encode()).digest())
