"""Population-based training: who goes on as whose fork, that a kill changes nothing, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rairl_ray.checkpoint import CheckpointStore, Identity
from rairl_ray.config.load import dump_yaml, load_config, read_saved
from rairl_ray.display import Display
from rairl_ray.errors import ConfigError
from rairl_ray.keys import keyed_random
from rairl_ray.report.report import make_report
from rairl_ray.runfolder import RunFolder, write_summary
from rairl_ray.sweep import population, run, supervise
from rairl_ray.sweep.file import Scheduler, SweepFile, load_sweep
from rairl_ray.sweep.lineage import Exploit, lineage, newest_exploits, planned_exploits, replayed, values_now
from rairl_ray.sweep.plan import list_trials
from rairl_ray.sweep.points import Trial, newest_folder, started_with, sweep_folder, trial_folder, trials
from rairl_ray.sweep.population import Population, check_side_by_side
from rairl_ray.sweep.result import conclude
from rairl_ray.sweep.status import blocks, look
from rairl_ray.sweep.supervise import ENDED, REPORT
from rairl_ray.types import Written
from tests.runs import ROOT
from tests.sweeps import OfTune, table, written

METRIC, RATE = "eval/pass_at_1", "policy.learning_rate"
STEPS = 8
OVERRIDES = {"warm_start": None, "eval.every": 1, "trainer.steps": STEPS, "trainer.checkpoint_every": 1}
SPACE: dict[str, Any] = {RATE: {"loguniform": [1e-6, 1e-2]}, "advantage.scale": [False, True]}


def population_sweep(folder: Path, **changes: Any) -> SweepFile:
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "space": SPACE, "search": {"type": "random", "seed": 3}, "trials": 4, "seeds": [0],
        "scheduler": {"type": "pbt"}, "overrides": OVERRIDES,
    }  # fmt: skip
    return load_sweep(written(folder, **{**settings, **changes}))


class Member(OfTune):
    """One of Tune's trials, with what PopulationBasedTraining asks of it."""

    status, experiment_tag = "RUNNING", ""
    run_metadata = SimpleNamespace(
        checkpoint_manager=SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
    )

    def is_finished(self) -> bool:
        return self.status == "TERMINATED"

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config


def reached(rate: float) -> float:
    """Where a member's metric goes."""
    return 1 - (math.log10(rate) + 4) ** 2 / 8


class Process:
    """One process of a sweep over a population: rows and checkpoints in real folders, without Tune."""

    def __init__(self, file: SweepFile) -> None:
        self.file, self.told = file, list[str]()
        self.scheduler = Population(file, None, self.told.append)
        self.scheduler.set_search_properties(METRIC, "max")
        self.planned = trials(file)
        self.members = {item.id: self._member(item) for item in self.planned}
        self.controller = SimpleNamespace(search_alg=None, get_trials=lambda: [*self.members.values()])
        for member in self.members.values():
            self.scheduler.on_trial_add(self.controller, member)

    def _member(self, item: Trial) -> Member:
        folder = RunFolder(trial_folder(self.file, item.id))
        if not folder.config.is_file():
            folder.create()
            folder.write_config(dump_yaml(load_config(self.file.base, started_with(self.file, item))))
        values = values_now(self.file, item.id, item.values)
        spec = {"folder": str(folder.root), "values": values, "steps": STEPS}
        return Member(f"tune-{item.id}", {"spec": spec})

    def step(self, item: Trial) -> None:
        """The member's next step: a row, a checkpoint, a report. It learns best at a rate of 1e-4."""
        folder = RunFolder(newest_folder(self.file, item.id))
        rows = folder.read_metrics()
        before = rows[-1][METRIC] if rows else 0.0
        step, aim = len(rows) + 1, reached(read_saved(folder.config).policy.learning_rate)
        value = (before + aim) / 2 + keyed_random(item.id, step).uniform(-0.1, 0.1)
        if step > STEPS:
            return
        folder.append_metrics(step, {METRIC: value})
        store = CheckpointStore(folder.root, keep=2)
        draft = store.begin(step, {"progress": {"step": step}})
        store.commit(draft, {"policy": Written({}, {}, 0.0)}, {}, Identity("hash", "code", None))
        member = self.members[item.id]
        result = {METRIC: value, "step": step, REPORT: step}
        assert self.scheduler.on_trial_result(self.controller, member, result) == "CONTINUE"
        if step == STEPS and newest_folder(self.file, item.id) == folder.root:
            write_summary(folder.evaluation("final") / "summary.json", {METRIC: {"value": value}})
            folder.final_policy.mkdir(parents=True)
            folder.final_reward_model.mkdir()
            (folder.final_reward_model / "reward.json").touch()
            self.scheduler.on_trial_result(self.controller, member, {METRIC: value, "step": ENDED})
            member.status = "TERMINATED"

    def rounds(self, first: int, last: int) -> None:
        for _ in range(first, last):
            for item in self.planned:
                self.step(item)


def whole(folder: Path, **changes: Any) -> SweepFile:
    file = population_sweep(folder, **changes)
    Process(file).rounds(0, 2 * STEPS)
    return file


def test_the_worst_goes_on_as_a_fork_of_the_best(tmp_path: Path) -> None:
    before = random.getstate()
    file = whole(tmp_path)
    assert random.getstate() == before, "Tune's draws are keyed"
    rows = lineage(file)
    assert len(rows) > 3 and rows == planned_exploits(file)
    starts = {item.id: item for item in trials(file)}
    for row in rows:
        fork = RunFolder(trial_folder(file, row.member) / "forks" / str(row.number))
        config = read_saved(fork.config)
        assert row.score < row.donor_score and row.from_step <= row.step and row.member != row.donor
        assert config.policy.learning_rate == row.values[RATE] and 1e-6 <= row.values[RATE] <= 1e-2
        assert config.advantage.scale == row.values["advantage.scale"] and config.seed == 0
        assert config.name == f"sw/trials/{row.member}/forks/{row.number}"
        assert config.tracking.tags["rairl.trial"] == row.member
        assert CheckpointStore(fork.root).steps()[0] >= row.from_step - 1
        assert "forked from" in fork.events.read_text()
        assert [line["step"] for line in fork.read_metrics()][: row.from_step] == [*range(1, row.from_step + 1)]
    alone = [reached(item.values[RATE]) for item in starts.values()]
    conclude(file, list(starts.values()), Display("sw", 4))
    ends = [float(row[METRIC]) for row in table(sweep_folder(file))]
    assert min(alone) < 0.6 < 0.8 < min(ends), "no member is left behind"
    assert lineage(whole(tmp_path / "again")) == rows
    assert lineage(whole(tmp_path / "other", search={"type": "random", "seed": 4})) != rows


@pytest.mark.parametrize("scheduler", [{}, {"grace": 2, "interval": 2, "quantile": 0.5, "resample": 0.0}])
def test_a_killed_population_goes_on_as_if_nothing_had_been(scheduler: dict[str, Any], tmp_path: Path) -> None:
    settings = {"type": "pbt", **scheduler}
    alone = lineage(whole(tmp_path / "whole", scheduler=settings))
    killed = population_sweep(tmp_path / "killed", scheduler=settings)
    for first, last in ((0, 1), (1, 4), (4, 5), (5, 2 * STEPS)):
        Process(killed).rounds(first, last)
    assert alone and lineage(killed) == alone


def test_a_kill_between_line_and_fork_leaves_the_member_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = population_sweep(tmp_path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(population, "_make", killed)
        with pytest.raises(KeyboardInterrupt):
            Process(file).rounds(0, STEPS)
    (line,) = planned_exploits(file)
    assert lineage(file) == [] and newest_exploits(file) == {}
    assert newest_folder(file, line.member) == trial_folder(file, line.member)
    # a kill in the middle of making it leaves a folder that counts for nothing and is in nobody's way
    (trial_folder(file, line.member) / "forks" / ".tmp-2" / "old").mkdir(parents=True)
    assert newest_folder(file, line.member) == trial_folder(file, line.member)
    Process(file).rounds(0, 2 * STEPS)
    again = [row for row in lineage(file) if row.member == line.member]
    assert again[0].number == 2 and len({(row.member, row.number) for row in planned_exploits(file)}) == len(
        planned_exploits(file)
    )


def test_a_fork_that_cannot_be_made_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = population_sweep(tmp_path)
    process = Process(file)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(population, "_make", full)
    process.rounds(0, 2)
    assert lineage(file) == [] and any(
        "goes on as it is: " in text and "No space" in text for text in process.told
    )
    values = {name: member.config["spec"]["values"] for name, member in process.members.items()}
    assert values == {item.id: item.values for item in trials(file)}


def test_values_that_contradict_are_drawn_anew_and_at_last_the_donors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = population_sweep(tmp_path)
    process, drawn = Process(file), list[float]()

    def contradiction(trial: Any, donor: Any) -> tuple[Any, Any]:
        drawn.append(0)
        values = {**donor.config["spec"]["values"], "advantage.scale": "neither"}
        return {"spec": {"values": values}}, {}

    monkeypatch.setattr(process.scheduler, "_get_new_config", contradiction)
    process.rounds(0, 1)
    (row, *_) = lineage(file)
    start = {item.id: item.values for item in trials(file)}
    assert len(drawn) >= population.ATTEMPTS and row.values == start[row.donor]


def test_a_donor_without_a_checkpoint_waits_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(population_sweep(tmp_path))
    monkeypatch.setattr(CheckpointStore, "steps", lambda self: [])
    process.rounds(0, 1)
    assert process.told and all("has no checkpoint yet" in text for text in process.told)
    assert planned_exploits(process.file) == []


def test_a_tie_forks_nothing(tmp_path: Path) -> None:
    process = Process(population_sweep(tmp_path))
    for item in process.planned:
        member = process.members[item.id]
        process.scheduler.on_trial_result(process.controller, member, {METRIC: 0.5, "step": 1, REPORT: 1})
    assert planned_exploits(process.file) == [] and process.told == []


def test_only_mutations_change_the_rest_is_the_donors(tmp_path: Path) -> None:
    file = whole(tmp_path, scheduler={"type": "pbt", "mutations": [RATE], "resample": 0.0})
    now = {item.id: item.values for item in trials(file)}
    for row in lineage(file):
        assert row.values["advantage.scale"] == now[row.donor]["advantage.scale"]
        ratio = row.values[RATE] / now[row.donor][RATE]
        assert ratio == pytest.approx(0.8) or ratio == pytest.approx(1.2)
        now[row.member] = row.values


def test_a_standing_by_hand() -> None:
    settings = Scheduler(type="pbt", grace=2, interval=2)
    reports = [(10, 0.1), (20, 0.2), (30, math.nan), (40, 0.4), (50, 0.5)]
    assert dataclasses.astuple(replayed(reports[:1], settings)) == (None, 0, 0)
    assert dataclasses.astuple(replayed(reports[:2], settings)) == (0.2, 2, 2)
    assert dataclasses.astuple(replayed(reports, settings)) == (0.4, 4, 4)
    born = Exploit("m", 1, 4, 40, -1.0, "d", 0, 0.9, 3, 20, {})
    assert dataclasses.astuple(replayed(reports[:2], settings, born)) == (-1.0, 3, 3), "no report of its own"
    assert dataclasses.astuple(replayed(reports, settings, born)) == (0.5, 5, 5)


def test_table_status_report_and_best_show_the_lineage(tmp_path: Path) -> None:
    file = whole(tmp_path)
    planned = trials(file)
    (sweep_folder(file) / run.SAVED).write_text(file.model_dump_json())
    assert conclude(file, planned, Display("sw", 4)) == 0
    rows, now = table(sweep_folder(file)), newest_exploits(file)
    for row in rows:
        assert float(row[RATE]) == values_now(file, row["trial"], {RATE: float(row[RATE])})[RATE]
        followed = [f"{e.donor[-6:]}@{e.from_step}" for e in lineage(file) if e.member == row["trial"]]
        assert row["lineage"] == " > ".join(followed)
    best = json.loads((sweep_folder(file) / "summary.json").read_text())["best"]
    config = load_config(sweep_folder(file) / "best.yaml")
    assert config.policy.learning_rate == best[RATE] and config.name == "sw-best"
    seen = look(file)
    assert {item.state for item in seen} == {"finished"} and {item.value for item in seen} == {
        float(row[METRIC]) for row in rows
    }
    forks = blocks(file, seen)[-1]
    assert forks.title.startswith("forks") and forks.rows[-1]["from"] == lineage(file)[-1].origin
    (page, *_), _ = make_report([str(sweep_folder(file))])
    assert (
        "Who went on as whose fork" in page.read_text() and next(iter(now.values())).origin in page.read_text()
    )


def test_the_watcher_goes_on_in_the_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, code = tmp_path / "t", (
        "import sys, time; from rairl_ray.runfolder import RunFolder;"
        "f = RunFolder(sys.argv[1]); print(f.root);"
        "[f.append_metrics(len(f.read_metrics()) + 1, {'m': 0.5}) for _ in range(2)];"
        "print('waits', flush=True); time.sleep(0 if 'forks' in sys.argv[1] else 60)"
    )  # fmt: skip
    RunFolder(root).create()
    monkeypatch.setattr(
        supervise, "_command", lambda spec, folder: [sys.executable, "-c", code, str(folder.root)]
    )
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0.05)
    heard: list[dict[str, float]] = []

    def report(row: dict[str, float]) -> None:
        heard.append(row)
        if len(heard) == 2:
            fork = RunFolder(root / "forks" / "1")
            fork.create()
            fork.append_metrics(1, {"m": 0.9})

    monkeypatch.setattr(supervise.tune, "report", report)
    spec = {"folder": str(root), "log": str(tmp_path / "log"), "metrics": ["m"], "cwd": str(ROOT), "stops": []}
    supervise.run_trial(spec)
    assert [(row["step"], row.get(REPORT)) for row in heard] == [(1, 1), (2, 2), (2, 2), (3, 3), (ENDED, None)]
    assert (tmp_path / "log").read_text().splitlines() == [str(root), "waits", str(root / "forks/1"), "waits"]
    # what is started anew begins in the fork
    assert supervise._newest(spec).root == root / "forks" / "1"


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search": {"type": "pbt"}}, r"search\.type: pbt is a scheduler: write scheduler\.type=pbt"),
        (
            {"search": {"type": "optuna"}},
            r"search\.type=optuna draws from what has ended, .* take random or grid",
        ),
        ({"seeds": [0, 1]}, r"seeds=\[0, 1\]: a fork has its donor's seed; give one"),
        ({"space": {}}, r"no axis whose values a fork could change"),
        ({"trials": 1}, r"trials=1: a population has two members or more"),
        (
            {"scheduler": {"type": "pbt", "mutations": ["policy.rate"]}},
            r"mutations: policy\.rate is no axis; the",
        ),
        (
            {"scheduler": {"type": "pbt", "quantile": 0.7}},
            r"scheduler\.quantile: must be less than or equal to 0\.5",
        ),
        ({"scheduler": {"type": "pbt", "factors": []}}, r"scheduler\.factors: "),
        (
            {"scheduler": {"type": "pbt", "factors": [0.0, 1.2]}},
            r"scheduler\.factors\.0: must be greater than 0",
        ),
        (
            {"scheduler": {"type": "pbt", "resample": 2}},
            r"scheduler\.resample: must be less than or equal to 1",
        ),
        ({"scheduler": {"type": "pbt", "interval": 0}}, r"scheduler\.interval: must be greater than 0"),
        (
            {"scheduler": {"type": "pbt", "reduction": 3}},
            r"scheduler\.reduction: type=pbt has the keys grace, int",
        ),
        (
            {"scheduler": {"type": "asha", "mutations": []}},
            r"scheduler\.mutations: type=asha has the keys grace",
        ),
        (
            {"metric": ["eval/a", "eval/b"], "mode": ["max", "max"]},
            r"scheduler\.type=pbt: compares trials by one",
        ),
        (
            {"space": {**SPACE, "reward.density.every": {"grid": [5], "when": {"advantage.scale": True}}}},
            r"space\.reward\.density\.every: scheduler\.type=pbt changes it or what its `when` names",
        ),
    ],
)
def test_a_bad_population_is_one_line(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        population_sweep(tmp_path, **changes)
    assert len(str(error.value).splitlines()) == 1 and "sweep.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"overrides": {**OVERRIDES, "trainer.checkpoint_every": 0}}, r"^trainer\.checkpoint_every=0: .*forks"),
        ({"overrides": {**OVERRIDES, "eval.every": 0}}, r"^eval\.every=0: scheduler\.type=pbt compares"),
        (
            {"space": {**SPACE, "data.limit": [64, 128]}},
            r"^scheduler\.mutations: data\.limit: no key of a fork; ",
        ),
        ({"space": {"advantage.scale": [True]}, "search": {"type": "grid"}}, "the space has one point"),
    ],
)
def test_a_population_that_could_not_fork_starts_nothing(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = population_sweep(tmp_path, **changes)
    for start in (list_trials, run.sweep):
        with pytest.raises(ConfigError, match=said) as error:
            start(file)
        assert len(str(error.value).splitlines()) == 1
    assert not sweep_folder(file).exists()


def test_members_must_run_side_by_side(tmp_path: Path) -> None:
    file = population_sweep(tmp_path)
    check_side_by_side(file, 4, 4)
    with pytest.raises(ConfigError, match=r"^scheduler\.type=pbt: 4 members and 3 run at once, .* give fewer"):
        check_side_by_side(file, 4, 3)
