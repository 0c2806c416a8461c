# `make` alone prints this menu. Every target makes the virtual environment when it is missing.
.DEFAULT_GOAL := help
X ?= outputs/first
VENV := .venv
PYTHON := $(VENV)/bin/python
PYTHON3 ?= python3
# Where torch comes from, such as https://download.pytorch.org/whl/cu126 for an older driver; empty: the package index.
TORCH_INDEX ?=

help:  ## this menu
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(VENV)/ready  ## make the virtual environment (.venv), nothing else

$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(VENV)/ready  ## train the organism, run six arms of one seed, print and write their comparison (< 10 minutes)
	$(PYTHON) -m grpo_routing -m experiment=first
	$(PYTHON) -m grpo_routing.report outputs/first

test: $(VENV)/ready  ## the test suite (<= 10 minutes on two cores)
	$(PYTHON) -m pytest

test-slow: $(VENV)/ready  ## the tests that train for minutes
	$(PYTHON) -m pytest -m slow

slurm-test: $(VENV)/ready  ## sweeps through a real one-machine SLURM cluster, which root installs when it is missing (10 to 20 minutes)
	$(PYTHON) -m pytest -m slurm -n 0 tests/slurm

browser-test: $(VENV)/ready  ## report.html in a headless Chromium, which root installs when it is missing (some minutes)
	$(PYTHON) -m pytest -m browser -n 0 tests/browser

report: $(VENV)/ready  ## page, table and figures of an experiment: make report X=outputs/first
	$(PYTHON) -m grpo_routing.report $(X)

smoke: $(VENV)/ready  ## every stage once, in seconds, with an untrained model
	$(PYTHON) -m grpo_routing model=tiny_random trainer=smoke evaluation=smoke arm=erase experiment_name=smoke

routing: $(VENV)/ready  ## rollout-level routing under an imperfect detector: hundreds of runs, hours; it resumes
	$(PYTHON) -m grpo_routing -m experiment=routing_controls
	$(PYTHON) -m grpo_routing -m experiment=routing
	$(PYTHON) -m grpo_routing -m experiment=routing_spread
	$(PYTHON) -m grpo_routing.by_recall outputs/routing
	$(PYTHON) -m grpo_routing.report outputs/routing > outputs/routing/report.txt

sources: $(VENV)/ready  ## routing by every mask source and its controls, and by every pair set: hours; it resumes
	for part in sources sources_untold sources_controls sources_arms sources_penalty pairsets; do $(PYTHON) -m grpo_routing -m experiment=$$part || exit 1; done
	$(PYTHON) -m grpo_routing.by_source outputs/sources --figure outputs/sources/figures/sources
	$(PYTHON) -m grpo_routing.diagnosis outputs/sources
	$(PYTHON) -m grpo_routing.by_source outputs/pairsets

baselines: $(VENV)/ready  ## penalty, screening, routing, modification, prompts and monitors at four horizons: hours; it resumes
	for part in baselines baselines_untold baselines_pressure; do $(PYTHON) -m grpo_routing -m experiment=$$part || exit 1; done
	$(PYTHON) -m grpo_routing.by_baseline outputs/baselines --csv outputs/baselines/steps.csv --figure outputs/baselines/figures/steps
	$(PYTHON) -m grpo_routing.obfuscation outputs/baselines --csv outputs/baselines/obfuscation.csv

evidence: $(VENV)/ready  ## the headline, four times its steps (twice), each loophole held out, ablations, with their claims: many hours; it resumes
	for part in headline headline_long levers held_out ablations; do \
	  $(PYTHON) -m grpo_routing -m experiment=$$part hydra/launcher=local hydra.launcher.parallel=2 || exit 1; \
	  $(PYTHON) -m grpo_routing.report outputs/$$part $$(test $$part = ablations && echo --without-controls) > outputs/$$part/report.txt || exit 1; done

check: $(VENV)/ready  ## the hack x mode matrix of the environment, and the organism's ten-seed check (half an hour)
	$(PYTHON) -m grpo_routing.env.check
	$(PYTHON) -m grpo_routing.organism check

bench: bench-grader bench-sampling bench-gradient bench-step bench-laptop bench-memory bench-sweep  ## all benchmarks but the scaling table

bench-grader: $(VENV)/ready  ## sandbox against one interpreter per submission
	$(PYTHON) -m benchmarks.grader

bench-sampling: $(VENV)/ready  ## the policy's sampling against transformers.generate and continuous batching
	$(PYTHON) -m benchmarks.sampling
	$(PYTHON) -m benchmarks.sampling engines

bench-gradient: $(VENV)/ready  ## batched per-rollout gradients against one backward per completion
	$(PYTHON) -m benchmarks.gradient

bench-memory: $(VENV)/ready  ## peak memory of the update over batch x micro-batch
	$(PYTHON) -m benchmarks.memory

bench-step: $(VENV)/ready  ## whole GRPO steps by arm and part, and TRL's where it is installed (pip install '.[bench]')
	$(PYTHON) -m benchmarks.step

bench-laptop: $(VENV)/ready  ## sixty laptop-preset steps on the organism, by part
	$(PYTHON) -m benchmarks.laptop
	$(PYTHON) -m benchmarks.laptop early

bench-scaling: $(VENV)/ready  ## the same step with more rollouts, tokens, width, rank, grading processes
	$(PYTHON) -m benchmarks.step scaling

bench-sweep: $(VENV)/ready  ## planning, and asking after, a sweep of a thousand runs
	$(PYTHON) -m benchmarks.sweep 1000

lint: $(VENV)/ready  ## ruff
	$(PYTHON) -m ruff check .

.PHONY: help setup run test test-slow slurm-test browser-test report smoke routing sources baselines evidence check bench bench-grader bench-sampling bench-gradient bench-step bench-laptop bench-scaling bench-memory bench-sweep lint
