"""A rank that computes nothing, in a module that imports nothing heavy: its processes start in a moment."""

from __future__ import annotations

import os
import subprocess
import time

import ray

from rairl_ray.actors.group import RankActor


class SmallActor(RankActor):
    def nap(self, seconds: float) -> int:
        time.sleep(seconds)
        return self.rank

    def fail(self, error: Exception) -> None:
        raise error

    def signal_self(self, number: int) -> None:
        os.kill(os.getpid(), number)

    def have_child(self) -> int:
        return subprocess.Popen(["sleep", "1000"]).pid

    def gpus(self) -> list[str]:
        """Those that Ray gives to this rank."""
        return [str(gpu) for gpu in ray.get_gpu_ids()]
