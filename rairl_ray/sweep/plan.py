"""`plan SWEEP.yaml`: the trials, what each takes, how many run at once, and their sum; nothing is started."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rairl_ray.actors.placement import (
    Node,
    PlacementPlan,
    check_against,
    present_or_promised,
    room,
    total_gpus,
)
from rairl_ray.config.estimate import memory, work
from rairl_ray.config.prediction import Assumptions, predict
from rairl_ray.config.schema import RunConfig
from rairl_ray.plan import (
    described,
    local_gpus,
    placement_with,
    print_memory,
    print_placement,
    print_threads,
    running_nodes,
)
from rairl_ray.sweep.file import SweepFile
from rairl_ray.sweep.lineage import check_population
from rairl_ray.sweep.points import Trial, examples, to_draw, trials, warm_start


def list_trials(file: SweepFile) -> None:
    """Print each trial's id, and how many more are drawn as results come."""
    planned = trials(file)
    check_population(file, planned)
    for item in planned:
        print(item.id)
    if file.search.type == "optuna" and examples(file):
        print(f"{to_draw(file)} trials are drawn by optuna as results come")


def as_run(file: SweepFile) -> RunConfig:
    """A trial's configuration under the sweep's name: what a cluster has to hold, and where the sweep lies."""
    item = (trials(file) or examples(file))[0]
    return item.config.model_copy(update={"name": file.name})


def show_sweep_plan(
    file: SweepFile,
    console: Console,
    gpus: int | None = None,
    nodes: int | None = None,
    cpus: int | None = None,
    address: str | None = None,
) -> None:
    """Print every trial with its size, each different placement with its memory, and the sum of all.

    Args:
        gpus, cpus, nodes: of a hypothetical cluster, as for a run; None: what this machine has.
        address: of a running cluster instead, as for a run.

    Raises:
        UserError: bad points; a trial that the cluster can never hold.
    """
    planned, undrawn = trials(file), to_draw(file)
    check_population(file, planned)
    shown = [*planned, *(examples(file)[:1] if undrawn else [])]
    if address is not None:
        cluster = present_or_promised(shown[0].config, running_nodes(address, gpus, nodes, cpus))
    else:
        size = {
            "CPU": float(cpus or os.cpu_count() or 1), "GPU": float(local_gpus() if gpus is None else gpus)
        }  # fmt: skip
        cluster = [Node(size) for _ in range(nodes or 1)]
    plans = [placement_with(item.config, total_gpus(cluster)) for item in shown]
    for plan in plans:
        check_against(plan, cluster)
    at_once = [room(plan, cluster) for plan in plans]
    title = f"{len(planned) + undrawn} trials" + (f", {len(planned)} of them drawn" if undrawn else "")
    _print_trials(title, shown, plans, at_once, len(planned), console)
    if undrawn:
        console.print(
            f"{undrawn} trials are drawn by optuna as results come; sizes of those are of an example",
            highlight=False,
        )
    warm_starts = {w.name: w for item in shown if (w := warm_start(file, item)) is not None}
    for name, earlier in warm_starts.items():
        console.print(f"trained first: {name} ({earlier.trainer.steps} SFT steps)", markup=False)
    most = min(file.max_concurrent or at_once[0], at_once[0], len(planned) + undrawn)
    console.print(
        f"{most} run at once on {described(cluster)} "
        f"(max_concurrent: {file.max_concurrent or 'as many as fit'})",
        highlight=False,
    )
    drawn = [shown[-1].config] * undrawn
    _print_sum([item.config for item in planned] + drawn, list(warm_starts.values()), console)
    _print_sizes(file, shown, plans, cluster, console)
    _print_hours(file, shown, plans, undrawn, most, console)


def _print_hours(
    file: SweepFile,
    shown: Sequence[Trial],
    plans: Sequence[PlacementPlan],
    undrawn: int,
    at_once: int,
    console: Console,
) -> None:
    """GPU hours of all trials and the time that they take side by side, where each can be predicted."""
    drawn = len(shown) - bool(undrawn)
    items = [*zip(shown, plans, strict=True)]
    found = []
    for item, plan in [*items[:drawn], *items[drawn:] * undrawn]:
        earlier = warm_start(file, item)
        found.append(predict(item.config, plan.total("GPU"), earlier.model.policy if earlier else None))
    known = [prediction for prediction in found if prediction is not None]
    if not known or len(known) < len(found):
        return
    hours = [prediction.hours for prediction in known]
    # No schedule is shorter than the longest trial, or than all work shared evenly.
    wall = max(max(hours), sum(hours) / at_once)
    console.print(
        f"\npredicted and not measured: {sum(one.gpu_hours for one in known):,.0f} GPU hours; at least "
        f"{wall:,.1f} hours, {at_once} trials at once\nassumed: {Assumptions()}",
        highlight=False,
    )


def _print_trials(
    title: str,
    shown: Sequence[Trial],
    plans: Sequence[PlacementPlan],
    at_once: Sequence[int],
    planned: int,
    console: Console,
) -> None:
    table = Table(title=title)
    table.add_column("trial", overflow="fold")
    for heading in ("CPUs", "GPUs", "fit at once", "steps", "completion tokens, at most"):
        table.add_column(heading, justify="right")
    for number, (item, plan, fit) in enumerate(zip(shown, plans, at_once, strict=True)):
        table.add_row(
            item.id if number < planned else f"example: {item.id}",
            f"{plan.total('CPU'):g}",
            f"{plan.total('GPU'):g}",
            str(fit),
            f"{item.config.trainer.steps:,}",
            f"{work(item.config).total_completion_tokens:,}",
        )
    console.print(table)


def _print_sum(runs: Sequence[RunConfig], warm_starts: Sequence[RunConfig], console: Console) -> None:
    """What all trials, and the warm starts that they share, do together."""
    table = Table(title="work of the whole sweep (tokens at their upper limits)")
    for heading in ("what", "trials", "warm starts"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    done = [[work(config) for config in part] for part in (runs, warm_starts)]
    rows = {
        "runs": [len(part) for part in done],
        "policy optimizer steps": [sum(w.policy_updates for w in part) for part in done],
        "discriminator optimizer steps, at most": [
            sum(w.discriminator_updates_most for w in part) for part in done
        ],
        "samples (warm starts: demonstrations)": [sum(w.total_samples for w in part) for part in done],
        "completion tokens": [sum(w.total_completion_tokens for w in part) for part in done],
    }
    for what, numbers in rows.items():
        table.add_row(what, *(f"{number:,}" for number in numbers))
    console.print(table)


def _print_sizes(
    file: SweepFile,
    shown: Sequence[Trial],
    plans: Sequence[PlacementPlan],
    cluster: Sequence[Node],
    console: Console,
) -> None:
    """Placement and memory, once for all trials that are alike in both."""
    groups: dict[str, list[int]] = {}
    for number, (item, plan) in enumerate(zip(shown, plans, strict=True)):
        earlier = warm_start(file, item)
        estimates = memory(item.config, earlier.model.policy if earlier else None)
        groups.setdefault(repr((plan, estimates)), []).append(number)
    for numbers in groups.values():
        item, plan = shown[numbers[0]], plans[numbers[0]]
        earlier = warm_start(file, item)
        if len(groups) > 1:
            console.print(f"\n{len(numbers)} trials such as {item.id}:", markup=False, highlight=False)
        print_placement(plan, cluster, console)
        print_threads(item.config, plan, console)
        print_memory(memory(item.config, earlier.model.policy if earlier else None), plan, console)
