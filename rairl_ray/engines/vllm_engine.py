"""The vLLM rollout engine, written against vLLM 0.32 (which weight_transfer*.py import, too), on CPU and CUDA.

vLLM runs inside the calling process (its workers too, unless tensor_parallel > 1). It reads its settings
from the environment at import, so an actor starts under `vllm_environment`; importing this module does not
import vllm. Full weights go through vLLM's own weight transfer (`weight_transfer.py`); an adapter gets a fresh
id, name and folder at every sync.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rairl_ray.config.transport import KEPT_ADAPTERS
from rairl_ray.config.variants import VLLM_RANKS
from rairl_ray.engines.environment import compute_environment
from rairl_ray.engines.rollout_engine import (
    Decode,
    EngineOptions,
    Generation,
    GenerationRequest,
    SamplingSettings,
    SyncReport,
    SyncState,
    WeightSyncError,
    check_adapter,
    check_completions,
    check_requests,
)
from rairl_ray.engines.weight_transfer import BACKENDS, check_vllm
from rairl_ray.engines.weights import adapter_folder, checksum
from rairl_ray.errors import ModelError
from rairl_ray.imports import NOT_FOR_TEXT, without

GIB = 2**30
ADAPTER_IDS = itertools.count(1)
"""Never used twice in a process, not even by two engines: vLLM's caches know an adapter by its id and name."""
WORKER_EXTENSION = "rairl_ray.engines.weight_transfer_vllm.TransferReport"
PREFILL_TOKENS = 8192
"""CPU: tokens of one prefill step."""
SMALL_BLOCK, SMALL_WINDOW = 32, 512
"""CPU: attention works on whole cache blocks, and only full blocks of a prompt are shared. Up to this window
the smallest block is fastest (10-20% against vLLM's 128 at 60 tokens)."""


def vllm_environment(*, device: Literal["cpu", "cuda"], threads: int = 1) -> dict[str, str]:
    """Environment variables that a process needs BEFORE it starts (an actor's `runtime_env`).

    `threads` (CPU): compute threads.
    """
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if device == "cpu":
        # binding would put the engines of one machine on the same cores
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # else the first call compiles a helper of the sampler with the C++ compiler for several seconds
        variables["TORCHDYNAMO_DISABLE"] = "1"
        variables |= compute_environment(device, threads)
    return variables


class VllmEngine:
    """See rollout_engine.RolloutEngine for the contract."""

    def __init__(self, options: EngineOptions, decode: Decode) -> None:
        with warnings.catch_warnings(), without(*NOT_FOR_TEXT):
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about vllm
            import vllm
            from vllm.lora.request import LoRARequest

            check_vllm()
        self._options = options
        self._decode = decode
        self._params: Any = vllm.SamplingParams
        self._lora_request: Any = LoRARequest
        self._state = SyncState()
        self._adapters: list[Any] = []  # newest last, at most KEPT_ADAPTERS
        self._current: Any = None
        self._asleep = False
        self._failure: str | None = None
        self._lora_targets = [] if options.lora_rank is None else linear_modules(options)
        self._llm: Any = vllm.LLM(**llm_arguments(options, self._lora_targets))

    @property
    def version(self) -> int | None:
        return self._state.version

    @property
    def checksum(self) -> str | None:
        return self._state.checksum

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingSettings) -> list[Generation]:
        self._state.require()
        check_requests(requests, sampling, self._options)
        if not requests:
            return []
        settings = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            # what ends a completion is said by the options alone, the same for every engine
            "ignore_eos": True,
            "stop_token_ids": sorted({self._options.eos_id, *self._options.stop_ids}),
            "logprobs": 0,
            "flat_logprobs": True,
            "detokenize": False,  # decoded once at the end, by the renderer
        }
        params = [self._params(seed=request.seed, **settings) for request in requests]
        outputs = self._run([request.prompt_ids for request in requests], params)
        return [self._generation(output.outputs[0]) for output in outputs]

    def _generation(self, output: Any) -> Generation:
        ids = tuple(output.token_ids)
        return Generation(
            token_ids=ids,
            logprobs=tuple(output.logprobs.logprobs),
            text=self._decode(ids),
            finish_reason="stop" if output.finish_reason == "stop" else "length",
        )

    def score_tokens(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        self._state.require()
        check_completions(prompt_ids, completion_ids, self._options)
        # vLLM must sample one token after a prompt. All but a trace's last token are the prompt, and the last
        # is looked up in the distribution of the sampled one: so a trace may fill the whole window.
        pairs = [(i, p, c) for i, (p, c) in enumerate(zip(prompt_ids, completion_ids, strict=True)) if c]
        params = [
            self._params(
                temperature=0.0,
                max_tokens=1,
                ignore_eos=True,
                detokenize=False,
                flat_logprobs=True,
                prompt_logprobs=0,
                logprob_token_ids=[int(completion[-1])],
            )
            for _, _, completion in pairs
        ]
        outputs = self._run([[*prompt, *completion[:-1]] for _, prompt, completion in pairs], params)
        scores: list[list[float]] = [[] for _ in completion_ids]
        for (index, prompt, completion), output in zip(pairs, outputs, strict=True):
            last = output.outputs[0].logprobs[0][int(completion[-1])].logprob
            # entry k of prompt_logprobs.logprobs belongs to token k + 1: the first token has none
            scores[index] = [*output.prompt_logprobs.logprobs[len(prompt) - 1 :], last]
        return scores

    def _run(self, prompts: Sequence[Sequence[int]], params: list[Any]) -> list[Any]:
        if not prompts:
            return []
        if self._failure is not None:
            raise RuntimeError(f"vLLM failed in an earlier call and must be opened anew: {self._failure}")
        self.wake()
        tokens = [{"prompt_token_ids": list(ids)} for ids in prompts]
        try:
            return self._llm.generate(tokens, params, use_tqdm=False, lora_request=self._current)
        except BaseException as error:
            # requests of this call are left behind in vLLM, and the next call would wait for them for ever
            self._failure = repr(error)
            raise

    def load_weights(self, chunks: Iterable[Mapping[str, Tensor]], version: int) -> SyncReport:
        started = time.perf_counter()
        self.start_weight_update()
        for chunk in chunks:
            self.update_weights({"named": list(chunk.items())}, version)
        return self.finish_weight_update(version, started)

    # Full weights in vLLM's own verbs: `load_weights` runs them, or a learner through the actor (NCCL, IPC).

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Meet the learner (NCCL); called once."""
        self._llm.init_weight_transfer_engine({"init_info": dict(init_info)})

    def start_weight_update(self) -> None:
        self.wake()
        self._state.begin()
        self._retire(keep=0)
        self._llm.start_weight_update()

    def update_weights(self, update_info: Mapping[str, Any], version: int) -> None:
        """Load one chunk."""
        try:
            self._llm.update_weights({"update_info": dict(update_info)})
        except (KeyError, ValueError, AssertionError, RuntimeError) as error:
            raise WeightSyncError(
                f"policy version {version} does not fit the rollout engine's model: {error}"
            ) from error

    def finish_weight_update(self, version: int, started: float) -> SyncReport:
        """`started`: time.perf_counter() when the update began."""
        self._llm.finish_weight_update(str(version))
        reports = self._llm.collective_rpc("transfer_report")
        faults = {fault for fault, *_ in reports if fault is not None}
        if faults:
            raise WeightSyncError(
                f"policy version {version} does not fit the rollout engine's model: {faults.pop()}"
            )
        partial = self._options.partial_syncs
        missing = sorted({name for _, names, halves, _ in reports for name in (halves if partial else names)})
        if missing:
            raise WeightSyncError(
                f"policy version {version} came without the weights of {', '.join(missing[:5])}"
            )
        checksums = {digest for *_, digest in reports}
        if len(checksums) != 1:
            raise WeightSyncError(f"policy version {version} arrived differently in the engine's workers")
        self._llm.reset_prefix_cache()
        return self._state.finish(checksums.pop(), int(self._llm.get_weight_version()), started)

    def load_adapter(
        self, tensors: Mapping[str, Tensor], adapter_config: Mapping[str, Any], version: int
    ) -> SyncReport:
        started = time.perf_counter()
        check_adapter(adapter_config, self._options)
        self.wake()
        self._state.begin()
        unserved = sorted(
            name for name in tensors if name.partition(".lora_")[0].rpartition(".")[2] not in self._lora_targets
        )
        if unserved:  # vLLM would leave some of them out without a word
            self._retire(keep=0)
            raise WeightSyncError(f"adapter of policy version {version}: unknown {', '.join(unserved[:5])}")
        self._retire(keep=KEPT_ADAPTERS - 1)
        number = next(ADAPTER_IDS)
        try:
            # vLLM keeps what it has read: the folder is needed for as long as this call takes
            with adapter_folder(tensors, adapter_config) as folder:
                request = self._lora_request(f"policy-{version}-{number}", number, folder)
                self._llm.llm_engine.add_lora(request)
        except (ValueError, RuntimeError) as error:
            self._retire(keep=0)
            raise WeightSyncError(f"adapter of policy version {version}: {error}") from error
        self._adapters.append(request)
        self._current = request
        return self._state.finish(checksum(tensors), version, started)

    def _retire(self, keep: int) -> None:
        """Forget all adapters but the newest `keep`."""
        while len(self._adapters) > keep:
            self._llm.llm_engine.remove_lora(self._adapters.pop(0).lora_int_id)
        if not self._adapters:
            self._current = None

    def mark_synced(self, version: int, checksum: str | None = None) -> None:
        self._state.version, self._state.checksum = version, checksum

    def sleep(self) -> None:
        if self._options.sleep and self._options.device == "cuda" and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._state.begin()
        self._adapters, self._current = [], None
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        cleanup_dist_env_and_memory()


def linear_modules(options: EngineOptions) -> list[str]:
    """Last names of the model's linear layers without its head: what PEFT calls "all-linear".

    Named to vLLM because it would wrap the head too, and its CPU kernels for that fail on prompt
    log-probabilities (vLLM 0.32: one row per request is expected, one per prompt token given).
    """
    config = AutoConfig.from_pretrained(
        options.model_path, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=options.trust_remote_code)
    head = model.get_output_embeddings()
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]
    return sorted({name.rpartition(".")[2] for name in linear})


def llm_arguments(options: EngineOptions, lora_targets: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; `lora_targets` as `linear_modules` finds them."""
    arguments: dict[str, Any] = {
        "model": options.model_path,
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        "dtype": options.dtype,
        "max_model_len": options.max_tokens,
        "max_num_seqs": options.max_sequences,
        "enable_prefix_caching": options.prefix_caching,
        "tensor_parallel_size": options.tensor_parallel,
        "logprobs_mode": "processed_logprobs",  # of what is sampled from: after temperature and top_p
        "worker_extension_cls": WORKER_EXTENSION,
        "weight_transfer_config": {"backend": BACKENDS[options.weight_transport]},
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if options.device == "cpu":
        arguments |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(options.cpu_cache_gib * GIB),
            # a prompt split over two steps breaks per-request seeds on a CPU
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(PREFILL_TOKENS, options.max_tokens),
        }
        if options.max_tokens <= SMALL_WINDOW:
            arguments["block_size"] = SMALL_BLOCK
    else:
        arguments |= {"gpu_memory_utilization": options.memory_share, "enable_sleep_mode": options.sleep}
        if options.tensor_parallel > 1:
            # inside a placement group vLLM would choose ray, and refuse our bundles of several GPUs
            arguments["distributed_executor_backend"] = "mp"
    if options.lora_rank is not None:
        fitting = [rank for rank in VLLM_RANKS if rank >= options.lora_rank]
        if not fitting:
            raise ModelError(
                f"model.policy.lora.rank={options.lora_rank}: vLLM serves ranks up to {VLLM_RANKS[-1]}; "
                "use a smaller rank or rollout.adapter=merged"
            )
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": fitting[0],
            "lora_target_modules": list(lora_targets),
            "max_loras": KEPT_ADAPTERS,
            "max_cpu_loras": KEPT_ADAPTERS,
        }
    return arguments
