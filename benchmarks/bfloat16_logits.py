"""What bfloat16 logits do to a young implicit head, and what float32 ones cost.

A small random Llama in bfloat16 is the reference; the same with a small low-rank change of every layer is the
head that has hardly learned. Their log-ratio of each token is compared with the one that float32 computes.
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, VOCABULARY, ROWS, LENGTH = 256, 4096, 8, 128


def reference(scale: float) -> Any:
    """A model whose logits have about the standard deviation `scale`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[1]))
        model.lm_head.weight.normal_(0, scale / math.sqrt(HIDDEN))
    return model.bfloat16()


def changed(model: Any, size: float) -> Any:
    """The model with an adapter of rank 8 on every linear layer, whose outputs change by about `size`."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            outputs, inputs = module.weight.shape
            down = (torch.randn(8, inputs) / math.sqrt(inputs)).bfloat16().to(module.weight.dtype)
            up = (torch.randn(outputs, 8) * size / math.sqrt(8)).bfloat16().to(module.weight.dtype)
            module.register_forward_hook(
                lambda _, given, made, down=down, up=up: made + F.linear(F.linear(given[0], down), up)
            )
    return model


@torch.no_grad()
def logprobs(model: Any, ids: Tensor, tokens: Tensor, logits: torch.dtype) -> Tensor:
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].reshape(-1, HIDDEN)
    found = F.linear(hidden.to(logits), model.lm_head.weight.to(logits)).float()
    return found.gather(1, tokens[:, None])[:, 0] - found.logsumexp(-1)


def compare(scale: float) -> None:
    model, ids = reference(scale), torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    with torch.no_grad():
        tokens = torch.multinomial(model(input_ids=ids).logits[:, :-1].float().softmax(-1).flatten(0, 1), 1)[
            :, 0
        ]
    exact = copy.deepcopy(model).float()
    for size in (0.001, 0.003, 0.01, 0.03):
        young = changed(model, size), model
        true = [logprobs(m, ids, tokens, torch.float32) for m in (changed(exact, size), exact)]
        ratio = true[0] - true[1]
        print(f"logits of {scale:g}, change {size:g}: log-ratio of a token {ratio.square().mean().sqrt():.4f}")
        for kind in (torch.bfloat16, torch.float32):
            found = [logprobs(m, ids, tokens, kind) for m in young]
            error = found[0] - found[1] - ratio
            trace = error.view(ROWS, -1).sum(1).square().mean().sqrt()
            seen = torch.corrcoef(torch.stack([found[0] - found[1], ratio]))[0, 1]
            print(
                f"  {kind}: error {error.square().mean().sqrt():.4f}, of a trace {trace:.2f}, "
                f"correlation {seen:.2f}"
            )


def cost(rows: int = 256, hidden: int = 576, vocabulary: int = 49152) -> None:
    states, weight = torch.randn(rows, hidden).bfloat16(), torch.randn(vocabulary, hidden).bfloat16()
    for kind in (torch.bfloat16, torch.float32):
        given = states.clone().requires_grad_(), weight.clone().requires_grad_()
        started = time.process_time()
        F.linear(given[0].to(kind), given[1].to(kind)).float().logsumexp(-1).sum().backward()
        print(
            f"head of {hidden} x {vocabulary}, {rows} tokens, {kind}: "
            f"{time.process_time() - started:.2f} s of CPU"
        )


if __name__ == "__main__":
    for standard_deviation in (3.0, 8.0):
        compare(standard_deviation)
    cost()
