"""Python's start-up hook where tests put this folder on PYTHONPATH: Ray's workers and runs' drivers are forks.

Each imports torch, transformers, DeepSpeed or vLLM for six to ten CPU seconds, the same modules each time, more
than most tests' own work takes. Here the process that Ray or a test starts asks a server (server.py), which has
imported them once, for a fork that does its work, and only waits for that fork's end.
`tests/conftest.py::warm_actors` says who uses it: tests that compare numbers, none that is about how processes
start, end or are killed.
"""

import os
import sys

for _place, _word in enumerate(sys.orig_argv if "RAIRL_WARM" in os.environ else ()):
    _kind = None
    if _word.endswith("ray/_private/workers/default_worker.py") and "TOKENIZERS_PARALLELISM" in os.environ:
        # a worker that computes (`compute_environment`), with vLLM (`vllm_environment`) or as a learner
        _kind = "vllm" if any(name.startswith("VLLM_") for name in os.environ) else "learner"
    elif _place == 1 and _word == "launch.py":
        _kind = "driver"
    if _kind is not None:
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
        import client

        client.fork_instead(_kind, sys.orig_argv[_place:])
        break
