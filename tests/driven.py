"""A run whose driver is a process of its own, as a test that takes its cluster apart sees it from outside."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rairl_ray.runfolder import RunFolder
from tests.faults import steps
from tests.runs import ROOT


class DrivenRun:
    """`demo/airl` below `output`, made by a Python call in a process whose output goes to driver.log."""

    process: subprocess.Popen[bytes]
    seconds = 240.0
    """How long any wait may last."""

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output / "demo" / "airl"
        output.mkdir()

    def call(self, python: Sequence[str], module: str, call: str, environment: Mapping[str, str]) -> None:
        """Begin `sys.exit(drive(...))`, `drive` from a test's module. `python`: the words before -c."""
        code = f"import sys\nfrom pathlib import Path\nfrom {module} import drive\nsys.exit({call})"
        with open(self.output / "driver.log", "ab") as log:
            self.process = subprocess.Popen(
                [*python, "-c", code], cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def reached(self, step: int) -> None:
        self.wait(lambda: self.folder.is_dir() and step in steps(self.folder))

    def wait(self, ready: Callable[[], bool]) -> None:
        until = time.monotonic() + self.seconds
        while not ready():
            assert self.process.poll() is None and time.monotonic() < until, self.said()
            time.sleep(0.05)

    def finish(self) -> None:
        assert self.process.wait(self.seconds) == 0, self.said()

    def said(self) -> str:
        log = RunFolder(self.folder).events
        return (self.output / "driver.log").read_text()[-4000:] + (log.read_text() if log.exists() else "")
