"""Python's start-up hook where tests put this folder on PYTHONPATH: what runs start are forks.

A driver or a computing actor imports torch, transformers, DeepSpeed or vLLM for up to ten CPU seconds, the
daemons of one Ray five between them, the same modules each time: more than most tests' own work takes. Here the
process that was started for it asks a server (server.py), which has imported them once, for a fork that does
its work, and only waits for that fork's end. What begins by itself all the same, says
`tests/conftest.py::warm_actors`.
"""

import os
import sys

DAEMONS = (
    "ray/dashboard/agent.py",
    "ray/dashboard/dashboard.py",
    "ray/autoscaler/_private/monitor.py",
    "ray/_private/log_monitor.py",
    "ray/_private/runtime_env/agent/main.py",
)
SCRIPTS = {"launch.py": "driver", "tests/rollout_harness.py": "vllm"}


def kind_of(script: str) -> str | None:
    """What a process that runs a script has to import, as the server calls it; None: it begins by itself."""
    if script in SCRIPTS:
        return SCRIPTS[script]
    if script.endswith(DAEMONS):
        return "daemon"
    if script.endswith("ray/_private/workers/setup_worker.py"):
        return "worker"  # becomes another program with an actor's environment, which comes here again
    if not script.endswith("ray/_private/workers/default_worker.py"):
        return None
    if "TOKENIZERS_PARALLELISM" not in os.environ:
        return "worker"
    # with `vllm_environment` a rollout engine, else a learner
    return "vllm" if any(name.startswith("VLLM_") for name in os.environ) else "learner"


if "RAIRL_WARM" in os.environ:
    _words = sys.orig_argv[2:] if sys.orig_argv[1:2] == ["-u"] else sys.orig_argv[1:]
    if _words[:1] == ["-m"] and len(_words) > 1:
        _words[:2] = [f"{_words[1].replace('.', '/')}.py"]
    if _words and (_kind := kind_of(_words[0])):
        import client

        client.fork_instead(_kind, _words)
