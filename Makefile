# make train: a trained MicroDiT and pictures to look at.   make test: the whole test suite.
# Both start from a bare machine with Python >= 3.11 and do nothing twice.

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart

export DS_BUILD_OPS := 0
export HF_HUB_OFFLINE ?= 1

.PHONY: train test install clean

train: install
	$(BIN)/deepspeed launchers/train.py --ds_config configs/zero2.json
	@test $(RUN)/evaluation/scores.json -nt $(RUN)/snapshots/latest/config.json || \
		$(BIN)/python launchers/evaluate.py --snapshot $(RUN)/snapshots/latest --out $(RUN)/evaluation
	@echo "Pictures of prompts that training never saw: $(RUN)/evaluation/grid.png"

test: install
	$(BIN)/python -m pytest

install: .venv/installed

.venv/installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("mdit needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart,test]'
	touch $@

clean:
	rm -rf .venv
