# make report   measure this machine and write one HTML file        make test   everything CI runs
# make lab      JupyterLab on the notebooks                         make bench  kernels and decode on the command line
#
# PYTHON=python3.12   the interpreter that .venv is made from
# VENV=none           use the active environment as it is (conda, a rented GPU image with torch)
# ARGS="..."          passed on, e.g. make report ARGS="--profile full --save-records"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

ifeq ($(VENV),none)
  RUN := $(PYTHON)
  BASE :=
  DEV :=
else
  RUN := $(VENV)/bin/python
  BASE := $(VENV)/.installed
  DEV := $(VENV)/.installed-dev
endif

# The CUDA packages are only of use beside a driver.
EXTRA := $(if $(shell command -v nvidia-smi 2>/dev/null),[gpu],)

.PHONY: report test lab bench readme clean
.DELETE_ON_ERROR:

report: $(BASE)
	$(RUN) -m trapetum report $(ARGS)

lab: $(BASE)
	$(RUN) -m jupyter lab --notebook-dir=notebooks $(ARGS)

bench: $(BASE)
	$(RUN) -m trapetum bench bandwidth $(ARGS)
	$(RUN) -m trapetum bench gemv $(ARGS)
	$(RUN) -m trapetum bench decode $(ARGS)

test: $(DEV)
	$(RUN) -m ruff check .
	$(RUN) -m nbstripout --keep-id --verify notebooks/*.ipynb
	$(RUN) -m pytest $(ARGS)
	$(RUN) -m trapetum verify

# Tables and pictures of the README from the committed records.
readme: $(DEV)
	$(RUN) -m trapetum.readme

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

ifneq ($(VENV),none)
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	  "Trapetum needs Python 3.11 to 3.13 and $(PYTHON) is %d.%d; name another, as in: make report PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)

$(BASE): $(VENV)/bin/python pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.$(EXTRA)'
	@touch $@

$(DEV): $(VENV)/bin/python pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(BASE)
endif
