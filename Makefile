# The verbs of CONTRIBUTING.md.
.PHONY: help setup fast test ci nightly engines format walk

help: ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/: .*## /\t/' | expand -t 10

setup: ## .venv and assets/
	bash scripts/setup.sh

fast: ## style, types and quick unit tests, under a minute
	bash scripts/test.sh fast

test: ## the default suite
	bash scripts/test.sh

ci: ## the default suite and slow tests
	.ci/run

nightly: ## everything but engines
	.ci/nightly

engines: ## tests against SGLang and vLLM
	.ci/engines

format: ## sort imports and format
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

walk: ## functions that run for one sample
	.venv/bin/python scripts/sample_walk.py
