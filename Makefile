# make demo   install (once) and run the main job: SFT warm start, R-AIRL, evaluation, result table
# make test   everything that a laptop can test;  make test-slow: the long end-to-end cases
# make test-ci  both of them in one go, the longest first: no core waits for the other's last test
# make test-matrix  every role stopped in every phase: an hour
# make cluster-test  clusters on this machine taken apart, jobs and Slurm (where it is installed), long sweeps: three quarters of an hour
# make mutants  ten minutes of small faults that tests must notice (docs/mutants.md)
# make bench  short versions of the benchmarks, one JSON file each in build/bench (docs/performance.md)
# make bench-quick  the fastest of them, three minutes: CI shows which ratios fell against benchmarks/kept.json
# make lint   ruff and mypy
# make audit  known weaknesses of the locked packages (pip-audit, asks PyPI)

PYTHON ?= python3.11
BIN := .venv/bin
PYTEST_ARGS ?=
# Two at a time: with three, two cores have no rest, and a test of 28 s took 92 and more.
TWO := -n 2 --dist worksteal --durations=20
CI_TESTS := not gpu and not matrix and (not cluster or in_ci)

# GSM8K=FOLDER: where train.jsonl and test.jsonl are; without it the data come from the hub
BENCH := build/bench

# Images of containers set it; then each of a test's many processes translates the whole package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: audit bench bench-quick install demo test test-slow test-ci test-matrix cluster-test gpu-test mutants lint format clean

install:
	@PYTHON=$(PYTHON) bash requirements/install.sh

demo: install
	@$(BIN)/python experiments/demo/run.py

test: install
	$(BIN)/python -m pytest -m "not slow and not gpu" $(TWO) $(PYTEST_ARGS)

test-slow: install
	$(BIN)/python -m pytest -m "slow and $(CI_TESTS)" $(TWO) $(PYTEST_ARGS)

test-ci: install
	$(BIN)/python -m pytest -m "$(CI_TESTS)" $(TWO) $(PYTEST_ARGS)

test-matrix: install
	RAIRL_COLD=1 $(BIN)/python -m pytest -m matrix $(PYTEST_ARGS)

cluster-test: install
	$(BIN)/python -m pytest -m cluster -rs $(PYTEST_ARGS)

gpu-test: install
	$(BIN)/python -m pytest -m gpu -rs $(PYTEST_ARGS)

# MINUTES=30 SEED=1 make mutants: longer, and other ones
mutants: install
	$(BIN)/python tests/mutants.py $(or $(MINUTES),10) $(or $(SEED),0)

bench: install
	@mkdir -p $(BENCH)
	$(BIN)/python -m benchmarks.learner_rows --rounds 3 --threads 1 --json $(BENCH)/learner_rows.json
	$(BIN)/python -m benchmarks.learner_bare --layers 8 --rounds 3 --json $(BENCH)/learner_bare.json
	$(BIN)/python -m benchmarks.rollout_throughput --rounds 3 --json $(BENCH)/rollout_throughput.json
	$(BIN)/python -m benchmarks.growth --largest 7.3M --rounds 2 --json $(BENCH)/growth.json --markdown $(BENCH)/growth.md
	$(BIN)/python -m benchmarks.merged_rollouts --rounds 2 --json $(BENCH)/merged_rollouts.json
	$(BIN)/python -m benchmarks.evaluate_throughput --prompts 64 --rounds 2 --json $(BENCH)/evaluate_throughput.json
	$(BIN)/python -m benchmarks.lines_memory --rows 10000 100000 --json $(BENCH)/lines_memory.json
	$(BIN)/python -m benchmarks.sweep_scale --nodes 4 --trials 12 24 --finished 50 100 --json $(BENCH)/sweep_scale.json
	$(BIN)/python -m benchmarks.mlflow_load --trials 100 --json $(BENCH)/mlflow_load.json
	$(BIN)/python -m benchmarks.against_trl --steps 2 $(if $(GSM8K),--data $(GSM8K)) --json $(BENCH)/against_trl.json
	$(BIN)/python -m benchmarks.compare $(BENCH)

bench-quick: install
	@mkdir -p $(BENCH)
	$(BIN)/python -m benchmarks.learner_bare --layers 4 --rounds 3 --json $(BENCH)/learner_bare_quick.json
	$(BIN)/python -m benchmarks.rollout_throughput --models demo --rounds 3 --json $(BENCH)/rollout_quick.json
	$(BIN)/python -m benchmarks.compare $(BENCH)

audit: install
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet pip-audit==2.10.1
	.venv-audit/bin/pip-audit --no-deps --disable-pip -r requirements/cpu.txt
	.venv-audit/bin/pip-audit --no-deps --disable-pip -r requirements/cuda.txt

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-audit build *.egg-info .mypy_cache .ruff_cache .pytest_cache
