"""Errors a user can act on, printed as one line with exit code 2; and how any error is said in one line."""

from __future__ import annotations

import re


class UserError(ValueError):
    """Bad input: the message names file, key, value and remedy in one line."""


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """A data file that cannot be used; names the file and the line."""


class ModelError(UserError):
    """A model folder or id that cannot be used."""


class ResumeError(UserError):
    """A run folder that cannot be resumed under this configuration."""


class PlacementError(UserError):
    """Resources that the cluster does not have."""


class RunFailure(RuntimeError):
    """A run that failed on its machines: one paragraph with role, rank, node, phase and last step."""


def redact(text: str) -> str:
    """`text` without user names, passwords and keys in addresses."""
    return re.sub(r"((?:access|secret)_key=)[^&\s]+", r"\1***", re.sub(r"://[^@/\s]+@", "://***@", text))


def brief(error: Exception) -> str:
    """One short line about any error, without secrets."""
    return (redact(str(error)).splitlines() or [type(error).__name__])[0][:200]
