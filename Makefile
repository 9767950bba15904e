# Everything that a person or a machine does with this repository. `make demo` and `make test` need nothing but Python.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.PHONY: demo test lint packaging clean

demo: $(VENV)/.demo          ## install, get a small chat model, serve it, show a first answer
	$(BIN)/python examples/first_answer.py

# llama.cpp first and by itself: its library and OpenVINO's are never in one process (tests/engines/conftest.py).
# The rest in two processes: a module's tests stay together, as their shared models and servers want, and go out in
# their order, so that no long module is left to the end. More processes than two starve tests of real models.
test: $(VENV)/.test          ## install and pass every test
	$(BIN)/python -m pytest tests/engines/test_llama_cpp.py tests/engines/test_llama_cpp_steps.py
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

lint: $(VENV)/.lint          ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

packaging:                   ## the wheel and the editable install, on each Python here
	sh .ci/packaging.sh

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml .ci/constraints.txt
	$(INSTALL) --editable '.[transformers]'
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) --editable '.[transformers,openvino,llama-cpp,test]'
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) --editable '.[lint]'
	touch $@

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
