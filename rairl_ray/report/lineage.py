"""Who went on as whose fork in a population."""

from __future__ import annotations

from collections.abc import Sequence

from rairl_ray.report.collect import Sweep
from rairl_ray.report.labels import label_of
from rairl_ray.report.parts import Absent, Cell, Number, Part, Table
from rairl_ray.sweep.lineage import lineage


def lineage_parts(sweep: Sweep) -> list[Part]:
    """A row an exploit, in order."""
    rows: list[Sequence[Cell]] = []
    sign = 1 if sweep.file.modes[0] == "max" else -1
    label, kind = label_of(sweep.file.metrics[0])
    for row in lineage(sweep.file):
        values = [Number(value=sign * value, kind=kind) for value in (row.score, row.donor_score)]
        rows.append(
            (row.member, Number(value=row.step, kind="count"), values[0], row.origin, values[1], row.told)
        )
    if not rows:
        raise Absent("no member has gone on as a fork yet")
    note = (
        "At this step the member was among the worst; it went on from the donor's checkpoint with the values. "
    )
    note += "Tables and figures count a member with its newest values."
    columns = ("member", "step", label, "donor@checkpoint", f"{label} of the donor", "new values")
    return [Table(name="lineage", title="Who went on as whose fork", columns=columns, rows=rows, note=note)]
