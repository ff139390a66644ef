"""Numbers over seeds: the mean, with the 95% interval of Student's t, a seed being one draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from rairl_ray.report.labels import Kind
from rairl_ray.report.parts import Number


def over_seeds(values: Mapping[int, Sequence[float]], kind: Kind = "plain") -> Number | None:
    """Mean over seeds of each seed's own mean. One seed has no interval; None without a finite value."""
    finite = {seed: [x for x in found if math.isfinite(x)] for seed, found in values.items()}
    means = np.array([np.mean(found) for found in finite.values() if found])
    if not means.size:
        return None
    middle, reach = float(means.mean()), math.nan
    if means.size > 1:
        reach = float(stats.t.ppf(0.975, means.size - 1) * means.std(ddof=1) / math.sqrt(means.size))
    return Number(value=middle, low=middle - reach, high=middle + reach, kind=kind)
