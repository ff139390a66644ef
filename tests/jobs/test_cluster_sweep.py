"""The demo sweep as a job of a cluster of separate nodes, one of which is killed and started again."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.local_cluster import SeparateNodes, separate_nodes
from tests.runs import ROOT, TINY_AIRL
from tests.sweeps import table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.in_ci,
    pytest.mark.cluster,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="cluster/local.sh needs Linux's /proc"),
]

SMALL = [*TINY_AIRL, "warm_start=null", "eval.prompts=4", "discriminator.warmup_max_steps=2", "trainer.steps=3"]


def job(nodes: SeparateNodes, *arguments: str, dashboard: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**nodes.environment, "RAY_ADDRESS": dashboard},
    )  # fmt: skip


def test_the_demo_sweep_as_a_job_outlives_a_node_and_ends_with_its_report(tmp_path: Path) -> None:
    with separate_nodes(2, "--cpus", "1") as nodes:
        dashboard = f"http://127.0.0.1:{nodes.options[5]}"
        fewer = ["seeds=[0]", "space.reward.density.type=[sparse, dense]"]
        words = ["experiments/sweeps/demo.yaml", f"output_dir={tmp_path}", *fewer, *SMALL]
        sent = job(nodes, "submit", "sweep", *words, dashboard=dashboard)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        folder = tmp_path / "sweeps" / "demo"
        deadline = time.monotonic() + 600
        while not list(folder.glob("trials/*/checkpoints/step-*1")):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        nodes.call("kill", "1")
        nodes.call("add")
        while not (folder / "best.yaml").exists():
            assert time.monotonic() < deadline + 900
            time.sleep(1)
        logs = job(nodes, "jobs", "logs", "sweep-sweeps-demo", "--follow", dashboard=dashboard)
        assert logs.returncode == 0, logs.stdout[-3000:]
        rows = table(folder)
        assert len(rows) == 4 and {row["state"] for row in rows} == {"finished"}
        reported = job(nodes, "submit", "--follow", "report", str(folder), dashboard=dashboard)
        assert reported.returncode == 0, reported.stdout[-3000:]
        page = (folder / "report" / "index.html").read_text()
        assert "Density by dataset" in page and "countdown" in page and "Effect of each axis" in page
        assert (folder / "report" / "tables" / "runs.csv").is_file()
    assert not nodes.processes()
