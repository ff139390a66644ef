"""A child process that compares LaTeX answers with math-verify; run as a script, never imported.

One JSON line {"gold", "answer"} in, one line "1" or "0" out, after a first line "ready". It stands alone
(no import of this package) so that it starts wherever math-verify is installed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import resource
import signal
import sys

SECONDS_PER_PAIR = 10
"""The parent's deadline is shorter; this one ends a worker whose parent died in the middle of a pair."""
MEMORY_BYTES = 4 * 2**30


def main() -> None:
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ValueError, OSError):  # not every system bounds the address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    def parsed(text: str) -> list[object]:
        if "\\" not in text:  # program notation, such as 2*sqrt(3)
            text = re.sub(r"sqrt\(([^()]*)\)", r"\\sqrt{\1}", text).replace("**", "^").replace("*", r" \cdot ")
        return list(parse(f"${text}$", parsing_timeout=None))

    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(SECONDS_PER_PAIR)
        pair = json.loads(line)
        try:
            equal = bool(verify(parsed(pair["gold"]), parsed(pair["answer"]), timeout_seconds=None))
        except (Exception, MemoryError):  # sympy raises anything; what cannot be compared is not equal
            equal = False
        signal.alarm(0)
        print("1" if equal else "0", flush=True)


if __name__ == "__main__":
    main()
