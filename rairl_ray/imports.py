"""Leaves out libraries that others load for nothing: it saves each process of a run a second or two."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*libraries: str) -> Iterator[None]:
    """Imports within find none of these libraries, unless one is loaded already; afterwards all are as before.

    For libraries that the imported one can do without, and whose use it guards itself.
    """
    hidden = [name for name in libraries if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None makes Python's import raise
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                del sys.modules[name]
