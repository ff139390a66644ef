"""Python's start-up hook where tests put this folder on PYTHONPATH: drivers and computing actors are forks.

Each imports torch, transformers, DeepSpeed or vLLM for up to ten CPU seconds, the same modules each time, more
than most tests' own work takes. Here the process that was started for it asks a server (server.py), which has
imported them once, for a fork that does its work, and only waits for that fork's end. Drivers that get signals
begin by themselves (`tests.runs.launch_background`); what else does, `tests/conftest.py::warm_actors` says.
"""

import os
import sys

if "RAIRL_WARM" in os.environ:
    if os.environ.pop("RAIRL_WARM_DRIVER", None) and sys.orig_argv[1:2] == ["launch.py"]:
        import client

        client.fork_instead("driver", sys.orig_argv[1:])
    elif "TOKENIZERS_PARALLELISM" in os.environ:
        for _place, _word in enumerate(sys.orig_argv):
            if _word.endswith("ray/_private/workers/default_worker.py"):
                import client

                # with `vllm_environment` a rollout engine, else a learner
                _vllm = any(name.startswith("VLLM_") for name in os.environ)
                client.fork_instead("vllm" if _vllm else "learner", sys.orig_argv[_place:])
                break
