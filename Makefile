# Everything a developer runs; `make help` lists it.
PYTHON ?= .venv/bin/python

.PHONY: help quality test test-all bench wheel lowest lab
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

quality: ## lint, formatting, types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test: ## the default suite
	$(PYTHON) -m pytest

test-all: ## the default suite and the slow tests
	$(PYTHON) -m pytest -m "not gpu"

bench: ## decoding benchmarks, side by side in one run
	$(PYTHON) benchmarks/decode.py
	$(PYTHON) benchmarks/ttt.py
	$(PYTHON) benchmarks/training.py
	$(PYTHON) benchmarks/sampling.py

wheel: ## build sdist and wheel, check the wheel's files, install it alone, run the quickstart by name
	PYTHON=$(PYTHON) .ci/wheel

UV ?= uv
LOWEST = tests/cli/test_errors.py tests/cli/test_predict.py tests/cli/test_fit.py tests/cli/test_guided_runs.py \
  tests/cli/test_sweep.py $(addprefix tests/unit/test_, target_model.py target_load.py draft_checkpoint.py decode.py \
  guided.py ttt.py training.py data.py saved_folders.py report.py statistics.py agreement.py math_grader.py)
lowest: ## a new environment of the lowest versions that pyproject.toml allows (uv), and tests of what they touch
	$(UV) venv --clear --python 3.11 .venv-lowest
	$(UV) pip install --python .venv-lowest/bin/python --resolution lowest-direct -e ".[dev]"
	.venv-lowest/bin/python -m pytest $(LOWEST)

LAB = dgd_lightning/lab/assets
lab: ## make the bundled pair again (hours on two cores)
	$(PYTHON) -m dgd_lightning.cli fit --config configs/lab/target.yaml --model.export_dir $(LAB)/target
	$(PYTHON) -m dgd_lightning.cli fit --config configs/lab/draft.yaml --model.export_dir $(LAB)/draft
