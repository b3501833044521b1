# make train: set up and train the embedded model.  make test: set up and run the tests.
PYTHON ?= python3
BIN := .venv/bin

# Linux: beside busy programs threads that wait must not spin (on an idle one, spinning is faster).
SPIN = $(shell awk -v cores=`nproc` '{ split($$4, running, "/"); if (running[1] >= cores) \
	print "GOMP_SPINCOUNT=0" }' /proc/loadavg 2>/dev/null)

train: .venv/train
	$(SPIN) $(BIN)/python real.py $(ARGS)

test: .venv/test
	$(BIN)/ruff check
	$(BIN)/python -m pytest -n auto --dist loadscope $(ARGS)

.venv/train: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	@echo "First .venv is set up, for a minute or more; then a model learns sums, a line a step."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: requirements-test.txt .venv/train
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-test.txt
	touch $@

.PHONY: train test
