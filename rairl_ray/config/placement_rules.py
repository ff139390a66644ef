"""Rules about where roles live: what they share, which nodes they ask for. `rules.check` runs them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

from rairl_ray.config import labels as selectors
from rairl_ray.config.machine_rules import Problems
from rairl_ray.config.schema import RunConfig


def strategy(config: RunConfig) -> Problems:
    """Learners are kept together, and engines apart, where they live in bundles of their own."""
    placement = config.placement
    if placement.strategy == "SPREAD_ROLLOUTS" and placement.type == "colocated":
        yield (
            "placement.strategy",
            "keeps learners together and engines apart, which share their bundles; set "
            "placement.type=disaggregated, or write PACK or SPREAD",
        )


def fractions(config: RunConfig) -> Problems:
    """Roles that share a GPU cannot take more than all of it."""
    placement = config.placement
    if placement.type != "colocated" or placement.device == "cpu":
        return
    shares = {
        "rollout": placement.rollout_gpu_fraction if config.rollout.tensor_parallel == 1 else 0.0,
        "policy": placement.policy_gpu_fraction,
        "discriminator": placement.discriminator_gpu_fraction if config.algorithm.needs.discriminator else 0.0,
    }
    total = sum(shares.values())
    if total > 1.0 + 1e-9:
        said = " + ".join(f"{role} {share:g}" for role, share in shares.items() if share)
        yield (
            "placement.policy_gpu_fraction",
            f"the roles on one GPU add up to {total:g} ({said}); lower the fractions to at most 1 together "
            "or write placement.type=disaggregated",
        )
    own = config.rollout.tensor_parallel > 1 or config.rollout.sleep or not config.rollout.offers.own_cache
    if (
        placement.device == "gpu"
        and not own
        and config.rollout.memory_share > placement.rollout_gpu_fraction + 1e-9
    ):
        yield (
            "rollout.memory_share",
            f"takes more than placement.rollout_gpu_fraction={placement.rollout_gpu_fraction:g} promises; "
            "make them equal or set rollout.sleep=true",
        )


def labels(config: RunConfig) -> Problems:
    """Selectors that Ray reads, and that agree where roles share a bundle."""
    wanted = {role: config.placement.labels.of(role) for role in ("rollout", "policy", "discriminator")}
    for role, selector in wanted.items():
        for key, value in selector.items():
            if why := selectors.problem(key, value):
                yield f"placement.labels.{role}", why
    if config.placement.type == "disaggregated":
        return
    together = [
        role
        for role in wanted
        if (role != "rollout" or config.rollout.tensor_parallel == 1)
        and (role != "discriminator" or config.algorithm.needs.discriminator)
    ]
    for first, second in combinations(together, 2):
        for key in sorted(wanted[first].keys() & wanted[second].keys()):
            if wanted[first][key] != wanted[second][key]:
                yield (
                    f"placement.labels.{second}",
                    f"{key}={wanted[second][key]} contradicts {key}={wanted[first][key]} of {first}, which "
                    "shares its bundles; make them equal, or set placement.type=disaggregated",
                )


PLACEMENT_RULES: tuple[Callable[[RunConfig], Problems], ...] = (strategy, fractions, labels)
