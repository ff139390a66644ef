"""Where a run stands in its data: a keyed permutation per epoch and one saved number."""

from __future__ import annotations

import numpy as np

from rairl_ray.errors import DataError, ResumeError
from rairl_ray.keys import keyed_generator


class Cursor:
    """Endless indexes into `size` rows; every epoch visits each row once, in its own keyed order.

    `stream` names what the cursor walks ("prompts", "experts"), so that two of them never move in step.
    The order is a function of (seed, stream, epoch) alone: a restored cursor continues exactly, in the
    middle of an epoch or at its edge.
    """

    def __init__(self, size: int, seed: int, stream: str) -> None:
        if size < 1:
            raise DataError(f"{stream}: there are no rows to read; check data.path and data.limit")
        self.size, self.seed, self.stream = size, seed, stream
        self.position = 0
        """Rows handed out since the start of the run, over all epochs."""
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def epoch(self) -> int:
        """The epoch that the next row belongs to."""
        return self.position // self.size

    def next(self, n: int) -> list[int]:
        """The next n row indexes; runs over the end of an epoch into the next one."""
        if n < 0:
            raise ValueError(f"cannot take {n} rows")
        indexes: list[int] = []
        while len(indexes) < n:
            epoch, offset = divmod(self.position, self.size)
            taken = self._permutation(epoch)[offset : offset + n - len(indexes)]
            indexes.extend(taken.tolist())
            self.position += len(taken)
        return indexes

    def state(self) -> dict[str, int | str]:
        """What a checkpoint stores (JSON)."""
        return {"size": self.size, "seed": self.seed, "stream": self.stream, "position": self.position}

    def restore(self, state: dict[str, int | str]) -> None:
        """Continues where `state()` was taken. Raises ResumeError for other data or another seed."""
        for key in ("size", "seed", "stream"):
            if state[key] != getattr(self, key):
                raise ResumeError(
                    f"{self.stream}: the checkpoint's cursor has {key}={state[key]} and this run "
                    f"{getattr(self, key)}; resume with the same data and seed"
                )
        self.position = int(state["position"])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._order = keyed_generator(self.seed, "cursor", self.stream, epoch).permutation(self.size)
            self._epoch = epoch
        return self._order
