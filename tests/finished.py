"""Finished runs without their training: run folders with real final artifacts, a different reward a seed."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from rairl_ray.config.load import dump_yaml
from rairl_ray.config.schema import Model, RunConfig
from rairl_ray.engines.artifacts import save_reward_model
from rairl_ray.engines.heads import ImplicitModel, ScalarModel
from rairl_ray.engines.models import load_causal_lm, load_token_classifier, resolve_model
from rairl_ray.engines.weights import exported_name
from rairl_ray.runfolder import RunFolder
from tests.inprocess import config_of


def trained_a_little(module: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Move every trained weight away from its start; the state as `trainable_state` gives it."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            state[exported_name(name)] = parameter.detach().clone()
    return state


def finished_run(output: Path, name: str, *overrides: str, seed: int = 0) -> RunConfig:
    """A run folder as `train` leaves it, with a policy that nobody trained and a reward drawn from `seed`."""
    config = config_of("airl", output, f"name={name}", f"seed={seed}", *overrides)
    folder = RunFolder(output / name)
    folder.create()
    folder.write_config(dump_yaml(config))
    folder.append_metrics(1, {"reward/mean": 0.0})
    base = resolve_model(config.model.policy, role="policy", cache_dir=output / ".cache" / "models", seed=seed)
    shutil.copytree(base, folder.final_policy)
    module: ImplicitModel | ScalarModel
    if config.discriminator.head == "implicit":
        module = ImplicitModel(load_causal_lm(base, Model()), config.discriminator.beta)
    else:
        module = ScalarModel(load_token_classifier(base, Model(), outputs=1, seed=seed))
    save_reward_model(folder.final_reward_model, module, trained_a_little(module, seed), base, config, 7)
    return config
