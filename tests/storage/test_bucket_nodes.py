"""A run and its evaluation on two real nodes, results in a bucket by way of a staging folder they share."""

from __future__ import annotations

from pathlib import Path

import pytest

from rairl_ray.checkpoint import MANIFEST, verify
from rairl_ray.mirrored_files import model_files
from rairl_ray.runfolder import read_summary
from rairl_ray.storage import STAGING_ENV, Store
from rairl_ray.trainer.outputs import Places
from tests.local_cluster import SeparateNodes, separate_nodes
from tests.runs import TINY_AIRL

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="cluster/local.sh needs Linux's /proc"),
    pytest.mark.slow,
    pytest.mark.cluster,
]

# Two nodes of one CPU each: four bundles of half a CPU, and later two actors of six tenths, need both.
APART = [
    "warm_start=null",
    "placement.type=disaggregated",
    "rollout.replicas=2",
    "placement.cpus_per_actor=0.5",
]


def verb(nodes: SeparateNodes, *words: str) -> str:
    done = nodes.launch(*words, f"cluster.address={nodes.address}", "tracking.uri=none")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stderr + done.stdout


def test_two_nodes_leave_a_run_and_its_evaluation_in_a_bucket(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = ["evaluate", "demo/airl", f"output_dir={uri}", "eval.prompts=16", "rollout.max_sequences=4"]
    with separate_nodes(2, "--cpus", "1") as nodes:
        verb(nodes, "train", "experiments/demo/airl.yaml", *TINY_AIRL, *APART, f"output_dir={uri}")
        monkeypatch.setenv(STAGING_ENV, str(tmp_path / "another machine's"))
        both = ["rollout.replicas=2", "learner.discriminator_replicas=2", "placement.cpus_per_actor=0.6"]
        verb(nodes, *evaluated, "eval.name=spread", *both)
        alone = ["rollout.replicas=1", "learner.discriminator_replicas=1"]
        verb(nodes, *evaluated, "eval.name=alone", *alone)
    store = Store(uri)
    there = store.names("demo/airl")
    steps = [name for name in there if name.endswith(f"/{MANIFEST}")]
    assert {"final/policy/config.json", "final/reward_model/reward.json"} <= there.keys() and steps
    monkeypatch.setenv(STAGING_ENV, str(tmp_path / "reader"))
    places = Places(uri, print)
    found = places.find("demo/airl")
    assert found is not None
    folder, over_there = places.with_checkpoint(found, 2)
    assert over_there == [1, 2] and verify(folder / "checkpoints" / "step-000002") is None
    assert places.fetched("demo/airl", model_files) == str(folder)
    summaries = []
    for name in ("spread", "alone"):
        file = tmp_path / f"{name}.json"
        store.download(f"demo/airl/evaluations/{name}/summary.json", file)
        summaries.append(read_summary(file))
    assert summaries[0] == summaries[1] and summaries[0]["eval/pass_at_1"]["n"] == 16
