"""Errors a user can act on. The command line prints them as one line and exits with code 2."""

from __future__ import annotations


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
