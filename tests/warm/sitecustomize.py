"""Python's start-up hook where tests put this folder on PYTHONPATH: actors that compute are forks.

Each imports torch, transformers, DeepSpeed or vLLM for ten CPU seconds, the same modules each time, more than
most tests' own work takes. Here the process that Ray starts for such an actor asks a server (server.py), which
has imported them once, for a fork that does its work, and only waits for that fork's end. Drivers begin by
themselves. `tests/conftest.py::warm_actors` says which tests do without.
"""

import os
import sys

if all(name in os.environ for name in ("RAIRL_WARM", "TOKENIZERS_PARALLELISM")):
    for _place, _word in enumerate(sys.orig_argv):
        if _word.endswith("ray/_private/workers/default_worker.py"):
            import client

            # with `vllm_environment` a rollout engine, else a learner
            _vllm = any(name.startswith("VLLM_") for name in os.environ)
            client.fork_instead("vllm" if _vllm else "learner", sys.orig_argv[_place:])
            break
