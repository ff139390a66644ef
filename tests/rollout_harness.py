"""What the contract tests of the rollout engines share: a vLLM engine in its own process, a small model,
adapters, and the reference, a plain transformers forward pass without cache or padding."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import traceback
from multiprocessing import current_process
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from rairl_ray.engines.rollout_engine import EngineOptions, GenerationRequest, SamplingSettings
from rairl_ray.engines.vllm_engine import VllmEngine, vllm_environment
from rairl_ray.engines.weights import SHARED_MEMORY
from tests.runs import ROOT

VOCABULARY, EOS, PROMPT, COMPLETION, RANK = 80, 1, 24, 24, 8
TOLERANCE = 1e-3
SAMPLING = SamplingSettings(max_tokens=COMPLETION)
START_SECONDS, CALL_SECONDS = 600, 120


def decode(ids: Any) -> str:
    """Stands in for the renderer: token i is a character, the end-of-sequence token is special."""
    return "".join(chr(40 + i) for i in ids if i != EOS)


class EngineProcess:
    """A VllmEngine in a process of its own, as an actor holds it: its environment is set before it starts."""

    def __init__(self, options: EngineOptions, folder: Path) -> None:
        self.folder, self.stderr = folder, folder / "stderr.txt"
        variables = vllm_environment(device=options.device, threads=1) | {"TMPDIR": str(folder)}
        self.connection, child = Pipe()
        with child, open(self.stderr, "w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                cwd=ROOT, env=os.environ | variables, stdin=child.fileno(), stdout=stderr, stderr=stderr,
            )  # fmt: skip
        # With the key, tensors travel in shared memory, as between multiprocessing's own processes.
        self.connection.send((bytes(current_process().authkey), options))

    def wait_started(self) -> None:
        self.pid = self._answer(START_SECONDS)

    def assert_closes_cleanly(self) -> None:
        self.close()
        assert self.process.wait(CALL_SECONDS) == 0
        assert "Traceback" not in self.stderr.read_text()
        assert not self.adapter_folders()

    def adapter_folders(self) -> list[Path]:
        """What the engine has left of adapters, in shared memory or in its temporary folder."""
        name = f"rairl-adapter-{self.pid}-*"
        return [*self.folder.glob(name), *SHARED_MEMORY.glob(name)]

    def _answer(self, seconds: float) -> Any:
        if not self.connection.poll(seconds):
            raise TimeoutError(f"no answer in {seconds} s; {self.stderr.read_text()[-2000:]}")
        try:
            ok, value = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"the engine's process has ended: {self.stderr.read_text()[-2000:]}") from None
        if not ok:
            raise value
        return value

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.connection.send((name, args, kwargs))
            return self._answer(CALL_SECONDS)

        return call() if name in ("version", "checksum") else call


def _serve(connection: Connection) -> None:
    current_process().authkey, options = connection.recv()
    try:
        engine = VllmEngine(options, decode)
        connection.send((True, os.getpid()))
    except BaseException as error:
        traceback.print_exc()
        connection.send((False, RuntimeError(repr(error))))
        return
    while True:
        name, args, kwargs = connection.recv()
        try:
            value = getattr(engine, name)
            connection.send((True, value(*args, **kwargs) if callable(value) else value))
        except Exception as error:
            connection.send((False, error))
        if name == "close":
            engine.close()  # twice is harmless
            return


def small_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        max_position_embeddings=PROMPT + COMPLETION,
        initializer_range=0.15,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def chunks(model: torch.nn.Module, size: int = 3) -> list[dict[str, torch.Tensor]]:
    """A learner's weights as they travel: named parameters (so without the tied head), a few in a chunk.

    Small chunks end in the middle of vLLM's fused layers (q, k and v are one there).
    """
    named = [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]
    return [dict(named[start : start + size]) for start in range(0, len(named), size)]


def requests(count: int, seed: int = 0) -> list[GenerationRequest]:
    """Prompts of different lengths, four requests each."""
    generator = np.random.default_rng(5)
    prompts = [
        tuple(int(t) for t in generator.integers(2, VOCABULARY, size=3 + i % (PROMPT - 3)))
        for i in range(count)
    ]
    return [GenerationRequest(prompt_ids=prompts[i // 4], seed=seed + 1000 * i + 2**61) for i in range(count)]


def reference_logits(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """[T, V] logits that predict each completion token."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()


def reference_logprobs(model: Any, prompt: Any, completion: Any, temperature: float = 1.0) -> list[float]:
    scaled = torch.log_softmax(reference_logits(model, prompt, completion) / temperature, -1)
    return scaled.gather(-1, torch.tensor(completion)[:, None])[:, 0].tolist()


def assert_reference(
    model: Any, asked: list[GenerationRequest], made: list[Any], temperature: float = 1.0
) -> None:
    for request, generation in zip(asked, made, strict=True):
        expected = reference_logprobs(model, request.prompt_ids, generation.token_ids, temperature)
        np.testing.assert_allclose(generation.logprobs, expected, atol=TOLERANCE)


def tokens(generations: list[Any]) -> list[tuple[int, ...]]:
    return [generation.token_ids for generation in generations]


def adapter(seed: int, rank: int = RANK) -> tuple[dict[str, torch.Tensor], dict[str, Any], Any]:
    """A random adapter as a learner sends it, and the model with it merged in."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(small_model(0)), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    tensors = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    return tensors, model.peft_config["default"].to_dict(), model.merge_and_unload().eval()


if __name__ == "__main__":
    _serve(Connection(os.dup(0)))
