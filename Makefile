# make demo    the whole path on a built-in data set: data, pretraining, finetuning
# make test    linter and tests; make test-slow: the tests that take minutes
# make results docs/digits.md: whether pretraining pays, five seeds (two hours and a half)
# make test-lower: the quick tests with the oldest releases that requirements.txt allows
# make test-newest: a part of them with the newest releases on the newest Python here
# make stress  tests with full repeats (hours); docs/reliability.md tells what they found
# make parity  docs/parity.md: our numbers against the published programs' (minutes)
#
# PYTHON=python3.12 chooses the interpreter, VENV=dir the virtual environment.
PYTHON ?= python3
VENV ?= .venv
# How often stress tests repeat what they repeat: small (as in CI) or full.
STRESS ?= full

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NEWEST = import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: help install demo results test test-slow test-lower test-newest stress parity format
help:
	@sed -n 's/^# \(make\)/\1/p' Makefile

install: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	@python="$(PYTHON)"; test ! -x $(BIN)/python || python=$(BIN)/python; \
	command -v "$$python" >/dev/null || { \
	  echo "$$python was not found: install Python 3.11 or newer, or name it with make PYTHON=..."; \
	  exit 1; }; \
	"$$python" -c "$(NEWEST)" || { \
	  echo "Python 3.11 or newer is needed, $$python is $$("$$python" --version 2>&1): name another with make PYTHON=python3.11 (and remove $(VENV) if it is there)."; \
	  exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "$(PYTHON) could not make a virtual environment in $(VENV); on Debian and Ubuntu install the package python3-venv."; \
	  exit 1; }
	@echo "Installing into $(VENV): a minute or more ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 2 \
	  -e ".[demo,dev]" >$(VENV)/install.log 2>&1 || { \
	  if grep -qE "connection broken|Max retries|Failed to establish|name resolution|ProxyError|timed out" $(VENV)/install.log; \
	  then echo "No network: pip could not reach the package registry; its messages are in $(VENV)/install.log."; \
	  else grep ERROR $(VENV)/install.log; \
	    echo "pip could not install the requirements; its messages are in $(VENV)/install.log."; fi; \
	  exit 1; }
	@touch $(INSTALLED)

demo: $(INSTALLED)
	@$(BIN)/python -m av_mae.demo --workdir runs/demo || { \
	  echo "make demo stopped at the fault above; run it again to go on."; exit 1; }

results: $(INSTALLED)
	@$(BIN)/python -m av_mae.results --workdir runs/results --out docs/digits.md || { \
	  echo "make results stopped at the fault above; run it again to go on."; exit 1; }

test test-slow test-lower test-newest stress parity: export JAX_PLATFORMS = cpu

QUICK := -m pytest -n auto --maxprocesses=4 --dist=loadfile

test: $(INSTALLED)
	@$(BIN)/ruff check . || { echo "make test: the linter found the faults above; make format mends most."; exit 1; }
	@$(BIN)/ruff format --check . || { echo "make test: the files above are not formatted; make format does it."; exit 1; }
	@$(BIN)/python $(QUICK) || { echo "make test: the tests named above failed."; exit 1; }

test-slow: $(INSTALLED)
	@$(BIN)/python -m pytest -m slow -n auto --maxprocesses=2 --dist=worksteal || { echo "make test-slow: the tests named above failed."; exit 1; }

# What meets the libraries most: media files, records, reading, models, checkpoints, and
# the user's own commands from clips to a classifier.
MEETING := $(addprefix tests/test_,media.py records.py pipeline.py dmvr.py spectrogram.py \
  autoencoder.py optim.py update.py checkpoints.py loop.py end_to_end.py export.py)
PIP := -m pip install --quiet --disable-pip-version-check --retries 2

test-lower:
	@rm -rf .venv-lower; $(PYTHON) -m venv .venv-lower
	@sed -nE 's/^([A-Za-z0-9_-]+)(\[[a-z]+\])?>=([0-9.]+)(,<[0-9.]+)?/\1==\3/p' requirements.txt >.venv-lower/constraints.txt
	@.venv-lower/bin/python $(PIP) -e ".[demo,dev]" -c .venv-lower/constraints.txt || { \
	  echo "make test-lower: the oldest releases could not be installed together (see above)."; exit 1; }
	@.venv-lower/bin/python $(QUICK) || { echo "make test-lower: the tests named above failed with the oldest releases."; exit 1; }

test-newest:
	@python="$$(.ci/newest_python)"; \
	if [ -z "$$python" ]; then echo "make test-newest: skipped, no Python 3.12 or newer was found."; exit 0; fi; \
	rm -rf .venv-newest; "$$python" -m venv .venv-newest && .venv-newest/bin/python --version && \
	.venv-newest/bin/python $(PIP) --upgrade -e ".[demo,dev]" && .venv-newest/bin/python $(QUICK) $(MEETING) || \
	{ echo "make test-newest: installation or the tests named above failed with the newest releases."; exit 1; }

stress: export AV_MAE_STRESS = $(STRESS)
stress: export AV_MAE_RECORD = $(CURDIR)/docs/reliability.new.json
stress: $(INSTALLED)
	@rm -f $(AV_MAE_RECORD)
	@$(BIN)/python -m pytest -m stress || { echo "make stress: the tests named above failed."; exit 1; }
	@mv $(AV_MAE_RECORD) docs/reliability.json
	@$(BIN)/python docs/reliability.py

parity: $(INSTALLED)
	@$(BIN)/python tests/parity.py
	@PYTHONPATH=. $(BIN)/python tests/parity_curve.py docs/parity_curve.png

format: $(INSTALLED)
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
