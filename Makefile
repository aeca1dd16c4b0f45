# make train: a trained MicroDiT and pictures to look at.   make test: the whole test suite.
# make quick: its fastest minute.   make slow: what takes minutes a test.   make lint: style and types.
# All start from a bare machine with Python >= 3.11 and do nothing twice.

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart
# Bytecode of what is imported is written at the first import; of all that is installed it would be a minute's work.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

export PYTHONDONTWRITEBYTECODE :=
export DS_BUILD_OPS := 0
export HF_HUB_OFFLINE ?= 1

.PHONY: train lint quick test slow announce test-kernels-triton-3.6 slurm-and-chromium install clean

train: install
	$(BIN)/deepspeed launchers/train.py --ds_config configs/zero2.json
	@test $(RUN)/evaluation/scores.json -nt $(RUN)/snapshots/latest || \
		$(BIN)/python launchers/evaluate.py --snapshot $(RUN)/snapshots/latest --out $(RUN)/evaluation --num_pictures 128
	@echo "Pictures of prompts that training never saw: $(RUN)/evaluation/grid.png"

lint: announce .venv/lint-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --project .

# Two files of tests at a time, each on a core: by name, as the folders of the longest come first and those of many short
# tests last.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

quick: .venv/test-installed
	$(PYTEST) -m quick

slow: .venv/test-installed
	$(PYTEST) -m slow

test: announce
	$(MAKE) --no-print-directory --jobs .venv/test-installed $(TRITON_3.6) .venv/fidelity slurm-and-chromium
	$(PYTEST)
ifeq ($(shell uname -s),Linux)
	$(MAKE) --no-print-directory test-kernels-triton-3.6
endif

TRITON_3.6 = $(if $(filter Linux,$(shell uname -s)),.venv/triton-3.6/installed)
DEBIANS = slurm-wlm munge chromium chromium-driver
HAVE_DEBIANS = which slurmctld munged chromium chromedriver >/dev/null 2>&1

announce:
	@test -e .venv/test-installed || echo "make lint and make test install into .venv the Python packages of constraints.txt, 4.4 GB"
	@$(HAVE_DEBIANS) || echo "make test installs Debian's packages $(DEBIANS), if this is Debian and its root"

# The kernels once more with the Triton that torch 2.11 brings (its interpreter knows no newer numpy): their builds, and
# each one's values and gradients.
test-kernels-triton-3.6: .venv/test-installed .venv/triton-3.6/installed
	PYTHONPATH=$(CURDIR)/.venv/triton-3.6 $(PYTEST) -q -W ignore tests/kernels/test_ahead_of_time.py \
		tests/kernels/test_self_check.py::test_kernels_as_they_are_pass

.venv/triton-3.6/installed: | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --upgrade --target $(@D) \
		triton==3.6.0 'numpy<2.4'
	touch $@

# torch-fidelity for tests/end_to_end/test_metrics.py, apart from all else: where there is a torchvision, transformers
# uses it, and that of PyPI does not work beside a torch for CPUs.
.venv/fidelity: | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target $@.partial \
		-c constraints.txt torch-fidelity torchvision && mv $@.partial $@ \
		|| { rm -rf $@.partial; echo "no torch-fidelity for the tests: pip install failed"; }

# A real Slurm for tests/end_to_end/test_slurm.py and a browser for test_demo.py, which are skipped without them, for the
# reason said here. From Debian's packages and only for root, as Slurm's daemons need that too.
slurm-and-chromium: | $(BIN)/pip
	@if $(HAVE_DEBIANS); then exit 0; \
	elif [ "$$(id -u)" != 0 ]; then echo "no Slurm and no Chromium for the tests: installing them needs root"; \
	elif [ ! -e /etc/debian_version ]; then echo "no Slurm and no Chromium for the tests: this is no Debian"; \
	else export DEBIAN_FRONTEND=noninteractive; \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $(DEBIANS); } >.venv/apt.log 2>&1 \
			|| echo "no Slurm and no Chromium for the tests: apt-get failed, see .venv/apt.log"; fi

.venv/lint-installed: .venv/test-installed
	$(PIP) -e '.[lint]'
	touch $@

install: .venv/installed

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit("mdit needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) -e '.[quickstart,test]'
	touch $@

# Without what they ask for: DALI's libraries for GPUs, and a torchvision that would have to match torch. Where there is
# no DALI or Triton (both are for Linux), their tests are skipped. Triton's version belongs to torch's build for GPUs, so
# constraints.txt does not name it.
.venv/test-installed: .venv/installed
	$(PIP) --no-deps open_clip_torch ftfy wcwidth
	$(PIP) --no-deps nvidia-dali-cuda130 nvidia-nvimgcodec-cu13 gast six astunparse optree makefun nvtx \
		|| echo "no DALI for this machine"
	$(PIP) --no-deps triton==3.9.0 || echo "no Triton for this machine"
	touch $@

clean:
	rm -rf .venv
