"""What people call the parts of a configuration, in a few words."""

from __future__ import annotations

from rairl_ray.config.schema import RunConfig


def density_name(config: RunConfig) -> str:
    """`interval 15`, `dense`, ..., or the verifier's name where no reward is learned."""
    if not config.algorithm.needs.discriminator:
        return config.reward.type if config.algorithm.needs.answers else "none"
    density = config.reward.density
    return f"{density.type} {density.every}" if density.needs.every else density.type


def model_name(model: object) -> str:
    """A path by its last folders, or what was built anew; an unset discriminator starts from the policy."""
    path, build = getattr(model, "path", None), getattr(model, "build", None)
    if path:
        return str(path) if not str(path).startswith(("/", ".")) else "/".join(str(path).rsplit("/", 4)[1:])
    return f"built: {build.layers} layers of {build.hidden_size}" if build is not None else "as the policy"
