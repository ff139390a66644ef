"""What all sections of the configuration share: frozen models without extras, and bounded numbers."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""Text that may name a file or folder; `~` is the home folder from here on."""
ActorFile = Annotated[str, AfterValidator(lambda path: os.path.abspath(os.path.expanduser(path)))]
"""A file that actors read, too: they stand elsewhere, so it is absolute from here on."""


ErrorKind = Literal["operator", "numbers", "propagated_error", "answer", "swap_answer", "choice", "corrupted"]
"""How a wrong copy of a right trace is made (algorithms/negatives.py)."""
ERROR_KINDS: tuple[ErrorKind, ...] = ("operator", "numbers", "propagated_error", "answer", "swap_answer")
"""Those that need nothing but the trace."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )
