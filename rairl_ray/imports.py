"""Loads large libraries for less: it saves each process of a run a second or two."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOT_FOR_TEXT = ("sklearn", "boto3")
"""What transformers loads for assisted generation alone, and accelerate for SageMaker."""


@contextmanager
def without(*libraries: str) -> Iterator[None]:
    """Imports within find none of these libraries, unless one is loaded already; afterwards all are as before.

    For libraries that the imported one can do without, and whose use it guards itself. Python's collector of
    cycles rests meanwhile: it would go again and again through a million objects that live as long as the
    process, for up to a fifth of the time of the imports.
    """
    hidden = [name for name in libraries if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None makes Python's import raise
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                del sys.modules[name]
        if collects:
            gc.enable()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Functions that are defined within under `torch.compile`, whatever its options, stay as they are.

    For modules whose functions nobody here calls: the decorator alone loads torch's compiler, a second and a
    thousand modules. Other threads must not compile meanwhile.
    """
    import torch

    def as_written(function: Any = None, **options: Any) -> Any:
        return as_written if function is None else function

    compiler = torch.compile
    torch.compile = as_written  # type: ignore[assignment]  # one function for all its overloads
    try:
        yield
    finally:
        torch.compile = compiler
