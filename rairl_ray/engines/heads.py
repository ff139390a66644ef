"""The trainable modules that learners give to DeepSpeed: log-probabilities, scalar scores, log-ratio scores.

Each wraps one Hugging Face (or PEFT) model as `wrapped` and does ALL its work inside `forward`, because
ZeRO-3 gathers a submodule's weights only around that submodule's own call. Rows are right padded: causal
attention then never looks at padding, and default position ids are right. With a `packing` of the same rows the
model reads them end to end instead, each prompt once (data/packing.py); what comes out is the same.

Shapes: B rows, L row length, T completion tokens, U units, V vocabulary, H hidden size, O outputs of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from rairl_ray.data.packing import Packing
from rairl_ray.engines.packed_attention import model_inputs, serve
from rairl_ray.errors import ModelError

CHUNK_TOKENS = 1024
"""Positions whose float32 logits exist at once: 1024 x 152k words are 0.6 GB."""


class LogprobLinear(nn.Linear):
    """A language-model head that can answer with log-probabilities of given tokens instead of logits.

    It replaces the model's own head with the same parameters under the same names. One call covers all
    chunks: under ZeRO-3 a call gathers the weight on all ranks, and ranks have different numbers of chunks.
    """

    chunk_tokens = CHUNK_TOKENS

    def forward(
        self,
        hidden_NH: Tensor,
        target_N: Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> Tensor:
        """[N, V] logits; with `target_N`: [N] float32 log-probabilities, or [2, N] with the entropies below."""
        if target_N is None:
            return super().forward(hidden_NH)
        hiddens, targets = hidden_NH.split(self.chunk_tokens), target_N.split(self.chunk_tokens)
        # One chunk keeps its logits for the backward pass; more would keep all of them, so recompute.
        recompute = len(hiddens) > 1 and torch.is_grad_enabled()
        rows = []
        for hidden, target in zip(hiddens, targets, strict=True):
            if recompute:
                row = checkpoint(self._chunk, hidden, target, temperature, with_entropy, use_reentrant=False)
            else:
                row = self._chunk(hidden, target, temperature, with_entropy)
            rows.append(row)
        return torch.cat(rows, dim=-1)

    def _chunk(self, hidden: Tensor, target: Tensor, temperature: float, with_entropy: bool) -> Tensor:
        logits_NV = _wide(F.linear(hidden, self.weight, self.bias)) / temperature
        normaliser_N = torch.logsumexp(logits_NV, dim=-1)
        logprobs_N = logits_NV.gather(1, target[:, None]).squeeze(1) - normaliser_N
        if not with_entropy:
            return logprobs_N
        with torch.no_grad():
            expected_N = (torch.exp(logits_NV - normaliser_N[:, None]) * logits_NV).sum(dim=-1)
        return torch.stack([logprobs_N, normaliser_N.detach() - expected_N])


class LogprobModel(nn.Module):
    """A causal language model whose forward answers log pi of completion tokens.

    `with_reference` keeps what `reference_logprobs` needs: for LoRA nothing (the adapter is switched off), for
    full fine-tuning a frozen copy of the model, unless `reference` is given. That copy is deliberately not a
    submodule: DeepSpeed neither shards nor saves it, so under ZeRO-3 each rank holds it unsharded.
    """

    def __init__(self, causal_lm: Any, *, with_reference: bool = False, reference: Any | None = None) -> None:
        super().__init__()
        self.wrapped = causal_lm
        self._adapter_reference = reference is None and hasattr(causal_lm, "peft_config")
        if reference is None and with_reference and not self._adapter_reference:
            reference = copy.deepcopy(causal_lm)
        if reference is not None:
            reference.eval().requires_grad_(False)
            _replace_head(reference)
        self._reference = (reference,)  # in a tuple, so that torch does not register it as a submodule
        _replace_head(_base(causal_lm))
        self.padded_because = serve(_base(causal_lm))
        """Why the model reads padded rows alone; None where it can read packed ones."""
        if reference is not None:
            self.padded_because = self.padded_because or serve(reference)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogprobModel:
        """`to(device)` reaches the reference too; its dtype stays (DeepSpeed casts only what it trains)."""
        super()._apply(fn, recurse)
        if self._reference[0] is not None:
            self._reference[0]._apply(fn, recurse)
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        target_positions: Tensor,
        completion_ids: Tensor,
        temperature: float = 1.0,
        *,
        reference: bool = False,
        with_entropy: bool = False,
        packing: Packing | None = None,
    ) -> Tensor:
        """[B, T] float32: log pi(completion_ids[b, t] | row before it) at the given sampling temperature.

        input_ids, attention_mask [B, L], right padded. target_positions [B, T]: index in the row of each
        completion token (it is predicted one position earlier); positions that do not continue the row's
        first one are padding, and the result is 0 there. completion_ids [B, T]. `reference` asks the
        reference model instead;
        `with_entropy` returns [2, B, T], the second being the entropy of each token's distribution.
        """
        switched_off = reference and self._adapter_reference
        model = self._reference[0] if reference and not switched_off else self.wrapped
        if model is None:
            raise RuntimeError("the model was built with with_reference=False")
        with _adapter_off(model) if switched_off else nullcontext():
            base = _base(model)
            backbone = getattr(base, base.base_model_prefix)
            inputs = model_inputs(input_ids, attention_mask, packing)
            hidden_NH = backbone(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
            order = torch.arange(target_positions.shape[1], device=target_positions.device)
            real = (target_positions > 0) & (target_positions - order == target_positions[:, :1])
            rows, columns = real.nonzero(as_tuple=True)
            before = target_positions[rows, columns] - 1
            before = rows * input_ids.shape[1] + before if packing is None else packing.place[rows, before]
            # Not hidden_NH[before]: where traces share a position, several threads would add up its gradients
            # in no fixed order, and a resumed run would differ in the last bits.
            values = base.get_output_embeddings()(
                hidden_NH.index_select(0, before), completion_ids[rows, columns], temperature, with_entropy
            )
        answer = values.new_zeros(*values.shape[:-1], *target_positions.shape)
        answer[..., rows, columns] = values
        return answer

    def reference_logprobs(self, *args: Any, **kwargs: Any) -> Tensor:
        """`forward` of the reference model, without gradients. Under ZeRO-3 all ranks must call it."""
        with torch.no_grad():
            return self(*args, **kwargs, reference=True)


class ImplicitModel(LogprobModel):
    """The implicit discriminator head: f_t = beta (log pi_phi(y_t) - log pi_ref(y_t)) (docs/method.md 3).

    The reference is the model as it was loaded, or `reference`, which saved weights were trained against. Sums
    over a unit's tokens are the unit's logit (`algorithms.discriminator_losses.segment_sums`). In bfloat16 the
    hidden states' rounding hides a young head's ratios, whatever the logits' dtype (docs/results.md).
    """

    def __init__(self, causal_lm: Any, beta: float, *, reference: Any | None = None) -> None:
        super().__init__(causal_lm, with_reference=True, reference=reference)
        self.beta = beta

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        target_positions: Tensor,
        completion_ids: Tensor,
        *,
        reference: bool = False,
        reference_BT: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """[B, T] float32 token values, with gradients through pi_phi alone; arguments as `LogprobModel`.

        `reference` asks for log pi_ref itself; `reference_BT` is such an answer and spares the reference pass.
        """
        batch = (input_ids, attention_mask, target_positions, completion_ids)
        if reference_BT is None:
            with torch.no_grad():
                reference_BT = super().forward(*batch, reference=True, packing=packing)
        if reference:
            return reference_BT
        return self.beta * (super().forward(*batch, packing=packing) - reference_BT)


class ScalarModel(nn.Module):
    """A token classifier: the scalar head, Linear(H -> O) on every position (docs/method.md 2)."""

    def __init__(self, token_classifier: Any) -> None:
        super().__init__()
        self.wrapped = token_classifier
        self.padded_because = serve(_base(token_classifier))
        """Why the model reads padded rows alone; None where it can read packed ones."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        unit_positions: Tensor,
        state_positions: Tensor | None = None,
        *,
        penalty: Callable[[Tensor, Tensor], Tensor] | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(values, shaping, penalty) of a batch.

        values [B, U] float32: first output at `unit_positions` [B, U], the position in the row of each unit's
        last token. shaping [B, U], only for a head with two outputs: the second output at `state_positions`
        [B, U], the position in front of each unit's first token (prompt_length + unit start - 1); else None.
        Padded positions may point anywhere in the row; their results are to be masked.

        `penalty(values_BU, embeddings_BLH)`, if given, is evaluated HERE on the values and the input
        embeddings, and its result returned as the third item. It may differentiate the values by the
        embeddings with `create_graph=True`; outside of forward, DeepSpeed's hooks would take that for the
        real backward pass. ZeRO-3 releases weights in between and cannot do it: use stage 0 to 2. It needs
        padded rows: a shared prompt's embeddings are those of many rows.
        """
        base = _base(self.wrapped)
        inputs = model_inputs(input_ids, attention_mask, packing)
        if penalty is not None:
            if packing is not None:
                raise ValueError("a penalty on embeddings needs padded rows")
            embeddings_BLH = base.get_input_embeddings()(inputs.pop("input_ids"))
            if not embeddings_BLH.requires_grad:
                embeddings_BLH.requires_grad_(True)
            inputs["inputs_embeds"] = embeddings_BLH
        # Only the plain attention kernel can be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH) if penalty is not None else nullcontext():
            logits_BLO = _wide(base(**inputs, use_cache=False).logits)
            if packing is not None:
                chosen = logits_BLO[0].index_select(0, packing.place.flatten())  # in a fixed order, as above
                logits_BLO = chosen.unflatten(0, packing.place.shape)
            values_BU = logits_BLO[..., 0].gather(1, unit_positions)
            shaping_BU = None
            if logits_BLO.shape[-1] == 2 and state_positions is not None:
                shaping_BU = logits_BLO[..., 1].gather(1, state_positions)
            cost = None if penalty is None else penalty(values_BU, embeddings_BLH)
        return values_BU, shaping_BU, cost


def _wide(values: Tensor) -> Tensor:
    """In float32, where they are not in float64 already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _base(model: Any) -> Any:
    """The Hugging Face model inside a PEFT wrapper (its layers then carry the adapter), or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _replace_head(base: Any) -> None:
    """Swap the model's output layer for a LogprobLinear that holds the very same parameters."""
    old = base.get_output_embeddings()
    if type(old) is not nn.Linear:
        raise ModelError(
            f"{base.name_or_path}: its output layer is a {type(old).__name__}, not a plain linear layer; "
            "use a Llama- or Qwen-like model and keep the output layer out of lora.target_modules"
        )
    scale = [
        key for key in ("final_logit_softcapping", "logit_scale", "logits_scaling") if _set(base.config, key)
    ]
    if scale:
        raise ModelError(
            f"{base.name_or_path}: models with `{scale[0]}` are not supported; use a Llama or Qwen model"
        )
    new = LogprobLinear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    new.weight, new.bias = old.weight, old.bias
    new.train(old.training)
    base.set_output_embeddings(new)


def _set(config: Any, key: str) -> bool:
    return getattr(config, key, None) not in (None, 1.0)


@contextmanager
def _adapter_off(model: Any) -> Iterator[None]:
    """Leave the LoRA adapter out of forward passes.

    PEFT's own `disable_adapter` also clears and sets `requires_grad`, which DeepSpeed must never see change.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
