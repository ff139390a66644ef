"""Each learner's update against a bare PyTorch loop on the same packed tokens, and against its operations.

Usage: python -m benchmarks.learner_bare [--roles policy discriminator] [--layers 30] [--prompt 250]
       [--completion 62] [--group 4] [--groups 2] [--lora 16] [--rounds 5] [--threads 2] [--json FILE]

In turn, in one process a role: `ours` (the actor's own update: tensors, DeepSpeed with ZeRO 1, loss, metrics),
`bare` (the same packed row through transformers, loss, clipping and AdamW, tensors made beforehand) and `plain`
(a stock causal row of as many tokens, transformers' own attention). `bound` is the formula's operations at the
rate of this process's float32 products of the model's sizes. The model has the blocks of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shared import SIZES, BareActor, Size, Traces, finish, make_model, spread, told
from rairl_ray.config.estimate import Shape, shape_of
from rairl_ray.config.schema import Lora, Model
from rairl_ray.data.batching import discriminator_tensors
from rairl_ray.engines.environment import compute_environment
from rairl_ray.engines.models import load_causal_lm
from rairl_ray.engines.packed_attention import model_inputs, serve

VOCABULARY = 49152


class Bare:
    """What somebody would write by hand: one model, one packed row, one loss, AdamW."""

    def __init__(self, role: str, path: str, lora: int | None, traces: Traces, *, packed: bool) -> None:
        model = Model.model_validate({"path": path, "lora": {"rank": lora}})
        self.model = load_causal_lm(path, model).train()
        self.base = self.model.get_base_model() if lora else self.model
        batch = discriminator_tensors(traces.labelled(), 0, packed=True)
        assert batch.packing is not None
        self.role, self.batch, self.traces = role, batch, traces
        self.targets = batch.completion_ids.flatten()
        if packed:
            assert serve(self.base) is None
            self.inputs = model_inputs(batch.input_ids, batch.attention_mask, batch.packing)
            rows = torch.arange(len(batch.input_ids))[:, None]
            self.before = batch.packing.place[rows, batch.target_positions - 1].flatten()
        else:
            self.inputs = {"input_ids": batch.input_ids.flatten()[batch.packing.source][None]}
            self.before = torch.arange(len(batch.packing.source))[-len(self.targets) :]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def loss(self, logprobs: Tensor) -> Tensor:
        """At the first update as ours: a ratio of 1, or the cross-entropy of each trace's log-ratio."""
        positive = self.batch.positive
        if self.role == "policy":
            sign = torch.where(positive, 1.0, -1.0)[:, None]
            ratio = torch.exp((logprobs - logprobs.detach()).view(len(positive), -1))
            return -torch.minimum(ratio * sign, ratio.clamp(0.8, 1.2) * sign).mean()
        logits = (logprobs.view(len(positive), -1) + 6.0).sum(1) * 0.1
        return F.binary_cross_entropy_with_logits(logits, torch.where(positive, 0.9, 0.1))

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        hidden = self.base.model(**self.inputs, use_cache=False).last_hidden_state[0]
        logits = F.linear(hidden.index_select(0, self.before), self.base.lm_head.weight)
        logprobs = logits.gather(1, self.targets[:, None])[:, 0] - torch.logsumexp(logits, -1)
        loss = self.loss(logprobs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        loss.item()


def operations(shape: Shape, traces: Traces, packed: int, lora: int | None) -> float:
    """Floating-point operations of a forward and backward pass: 2 a weight and token forward, as many again for
    the gradient by the inputs and, where weights are trained, by them; attention 4 a pair and value, twice that
    backward."""
    matrices = (
        2.0 * shape.quantised_parameters * packed + 2.0 * shape.vocabulary * shape.hidden_size * traces.tokens
    )
    pairs = traces.prompts * traces.prompt**2 / 2
    pairs += traces.tokens * (traces.prompt + traces.completion / 2)
    attention = 4.0 * shape.layers * shape.heads * shape.head_size * pairs
    adapter = 2.0 * shape.lora_parameters(Lora(rank=lora)) * packed
    return matrices * (2 if lora else 3) + 3 * attention + 3 * adapter


def measured_rate(shape: Shape, packed: int, completions: int) -> float:
    """Operations a second of the products of all layers' sizes and the output layer, best of three each."""
    sizes = [(packed, *pair) for pair in shape.linear_sizes.values()] * shape.layers
    sizes.append((completions, shape.hidden_size, shape.vocabulary))
    seconds = {one: _product_seconds(*one) for one in set(sizes)}
    return sum(2.0 * a * b * c for a, b, c in sizes) / sum(seconds[one] for one in sizes)


def _product_seconds(rows: int, inputs: int, outputs: int) -> float:
    left, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    return min(timed(lambda: F.linear(left, weight)) for _ in range(4))


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def parts(ours: BareActor, update: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one more update of ours, by who spends them."""
    found: dict[str, float] = {}

    def watch(owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                found[name] = found.get(name, 0.0) + time.perf_counter() - started

        setattr(owner, method, run)

    engine = ours.actor.engine._engine
    watch(ours.actor, "_tensors", "tensors")
    watch(engine, "forward", "forward")
    watch(engine, "backward", "backward")
    watch(engine, "step", "step")
    found["whole"] = timed(update)
    found["rest"] = 2 * found["whole"] - sum(found.values())
    return found


def measure(arguments: argparse.Namespace, role: str) -> dict[str, Any]:
    """One role, in this process."""
    torch.set_num_threads(arguments.threads)
    traces = Traces(
        arguments.groups, arguments.group, arguments.prompt, arguments.completion, VOCABULARY
    )  # fmt: skip
    widest = SIZES["106M"]
    size = Size(widest.hidden, arguments.layers, widest.heads, widest.kv_heads, widest.intermediate)
    lora = arguments.lora or None
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder), size, VOCABULARY)
        shape = shape_of(Model(path=path))
        assert shape is not None
        ours = BareActor(role, path, {"lora": lora})
        samples: Sequence[Any] = traces.sampled() if role == "policy" else traces.labelled()
        update = ours.update(samples)
        sides: dict[str, Callable[[], Any]] = {
            "ours": update,
            "bare": Bare(role, path, lora, traces, packed=True),
            "plain": Bare(role, path, lora, traces, packed=False),
        }
    for work in sides.values():
        work()  # the first of each is not counted
    packed = len(sides["bare"].inputs["position_ids"][0])  # type: ignore[attr-defined]
    rows, rates = [], []
    for number in range(arguments.rounds):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        rows.append({name: timed(sides[name]) for name in order})
        rates.append(measured_rate(shape, packed, traces.tokens))
    needed = operations(shape, traces, packed, lora)
    bounds = [needed / rate for rate in rates]
    return {
        "packed_tokens": packed,
        "completion_tokens": traces.tokens,
        "parameters": shape.parameters,
        "seconds": {name: spread([row[name] for row in rows]) for name in sides},
        "bare_over_ours": spread([row["bare"] / row["ours"] for row in rows]),
        "plain_over_ours": spread([row["plain"] / row["ours"] for row in rows]),
        "tera_operations": needed / 1e12,
        "product_giga_operations_per_second": spread([rate / 1e9 for rate in rates]),
        "bound_over_ours": spread([bound / row["ours"] for bound, row in zip(bounds, rows, strict=True)]),
        "bound_over_bare": spread([bound / row["bare"] for bound, row in zip(bounds, rows, strict=True)]),
        "parts_of_ours": parts(ours, update),
        "bound_seconds": statistics.median(bounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--roles", nargs="+", default=["policy", "discriminator"])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--prompt", type=int, default=250)
    parser.add_argument("--completion", type=int, default=62)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--lora", type=int, default=16, help="0: all weights are trained")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", default="")
    parser.add_argument("--role", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        finish(measure(arguments, arguments.role), "")
        return
    numbers = ("layers", "prompt", "completion", "group", "groups", "lora", "rounds", "threads")
    words = [f"--{name}={getattr(arguments, name)}" for name in numbers]
    environment = compute_environment("cpu", arguments.threads)
    roles = {
        role: told("benchmarks.learner_bare", [*words, f"--role={role}"], environment)
        for role in arguments.roles
    }
    settings = {name: getattr(arguments, name) for name in numbers}
    finish({"settings": settings, "roles": roles}, arguments.json)


if __name__ == "__main__":
    main()
