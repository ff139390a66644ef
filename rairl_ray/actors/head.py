"""Questions to the cluster's head (Ray's GCS), which may be away: nobody stands still until it is back.

Without the head, actors go on and answer each other, but whoever asks it something waits. So a question that a
step asks is put in a thread of its own, for a moment; while one is open no other is put.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")

ANSWER_SECONDS = 2.0
"""How long a question of a step waits for its answer."""


class HeadAway(Exception):
    """The head has not answered in time."""


class Head:
    """The head as one process asks it."""

    def __init__(self) -> None:
        self._open: threading.Thread | None = None
        self._begun = 0.0

    def ask(self, question: Callable[[], R], seconds: float = ANSWER_SECONDS) -> R:
        """The question's answer, or what it raises.

        Args:
            seconds: from the moment at which it, or the one that is still open, was put.

        Raises:
            HeadAway: there is none in time; it is no longer waited for.
        """
        if self._open is not None:
            self._open.join(max(0.0, self._begun + seconds - time.monotonic()))
            if self._open.is_alive():
                raise HeadAway
        answers: list[R] = []
        errors: list[BaseException] = []

        def put() -> None:
            try:
                answers.append(question())
            except BaseException as error:
                errors.append(error)

        self._begun = time.monotonic()
        self._open = threading.Thread(target=put, name="question to the head", daemon=True)
        self._open.start()
        self._open.join(seconds)
        if errors:
            raise errors[0]
        if not answers:
            raise HeadAway
        return answers[0]


ask = Head().ask
"""Of this process: its one connection has one head."""
