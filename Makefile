# Thin wrappers; each command is printed before it runs. `make help` lists them.
SHELL := /bin/sh
PYTHON ?= python3
ENV := .venv
BIN := $(ENV)/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONWARNINGS="$(PYTHONWARNINGS)"
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install repro test test-long prep smoke recipe compare tables bench bench-full bench-gpu lab readme clean ablations docs

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "selfclass needs Python >= 3.11, found: $$($(PYTHON) --version); say which: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(ENV)

$(ENV)/.pipeline: settings.ini setup.py pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(ENV) (torch is large: a few minutes on a good line)"
	$(INSTALL) -e '.[pipeline,widgets]'
	@test -e .git || $(RUN) dvc config -q --local core.no_scm true
	@touch $@

$(ENV)/.dev: $(ENV)/.pipeline
	$(INSTALL) -e '.[pipeline,widgets,docs,dev]'
	@touch $@

$(ENV)/.bench: $(ENV)/.pipeline
	$(INSTALL) -e '.[pipeline,widgets,bench]'
	@touch $@

$(ENV)/.docs: $(ENV)/.pipeline
	$(INSTALL) -e '.[pipeline,widgets,docs]'
	@touch $@

install: $(ENV)/.pipeline ## .venv with everything the pipeline needs

data/digits/digits.npz: data.dvc | $(ENV)/.pipeline
	$(RUN) dvc pull -q data.dvc
	@touch $@

repro: $(ENV)/.pipeline data/digits/digits.npz ## the Self-Classifier pipeline: train, embed, probe, cluster, report
	$(RUN) dvc repro report
	@cat out/report/summary.txt

compare: $(ENV)/.pipeline data/digits/digits.npz ## all methods of params.yaml side by side and beside the published numbers: out/compare/index.html
	$(RUN) dvc repro compare
	@cat out/compare/methods.md; echo 'page: out/compare/index.html'

tables: $(ENV)/.pipeline ## every table that a run exists for, as md, tex, html and csv: out/tables/; ALL=1 for the others too
	$(RUN) python -m selfclass.report $(if $(ALL),--all)

lab: $(ENV)/.pipeline data/digits/digits.npz ## JupyterLab on the front door
	$(RUN) jupyter lab nbs/index.ipynb

recipe: $(ENV)/.pipeline ## make recipe NAME=cifar10: put conf/cifar10.yaml in the place of params.yaml
	$(RUN) python -m selfclass.run --recipe '$(NAME)'

test: $(ENV)/.dev data/digits/digits.npz ## every test: library notebooks, then pytest
	$(RUN) SELFCLASS_PROGRESS=off nbdev_test --n_workers 2 --path nbs --skip_folder_re '^(pipeline|explore)' --timing --do_print
	$(RUN) SELFCLASS_PROGRESS=off python -m pytest -m 'not long'

test-long: $(ENV)/.dev data/digits/digits.npz ## the tests that take minutes: reproducibility of the whole pipeline
	$(RUN) SELFCLASS_PROGRESS=off python -m pytest -m long

smoke: $(ENV)/.dev ## every stage on its default cell, synthetic images, in a temporary folder, seconds
	$(RUN) SELFCLASS_PROGRESS=off python -m pytest tests/test_stages.py -k default_cell

prep: $(ENV)/.dev ## before each commit: export, clean, test, strip the outputs of stages
	$(RUN) nbdev_export
	$(RUN) nbdev_clean
	$(RUN) jupyter nbconvert --log-level=WARN --clear-output --inplace nbs/pipeline/*.ipynb
	$(RUN) nbdev_clean --fname nbs/pipeline
	$(MAKE) test

bench: $(ENV)/.bench ## speed and memory beside the peers, on CPU, 16 minutes on 2 cores; rewrites docs/benchmarks.md
	$(RUN) SELFCLASS_PROGRESS=off python -m benchmarks

bench-full: $(ENV)/.bench ## the same with the large sizes
	$(RUN) SELFCLASS_PROGRESS=off python -m benchmarks --full

bench-gpu: $(ENV)/.bench ## the rows of one GPU
	$(RUN) SELFCLASS_PROGRESS=off python -m benchmarks --device cuda

docs: $(ENV)/.docs ## the documentation site: _docs/html/index.html; runs no notebook, needs no network
	$(RUN) python -m sphinx -W --keep-going -q -b html -d _docs/doctrees docs _docs/html
	@echo 'page: _docs/html/index.html'

readme: $(ENV)/.dev ## README.md from nbs/index.ipynb, its figures from the last report
	test ! -d out/report/figures || cp out/report/figures/digits-best.png out/report/figures/digits-curves.png docs/images/
	$(RUN) jupyter nbconvert --log-level=WARN --to markdown --output-dir . --output README nbs/index.ipynb
	sed -i.bak 's#(\.\./#(#g' README.md && rm README.md.bak

ablations: $(ENV)/.pipeline data/digits/digits.npz ## the papers' ablation tables, on digits 38 minutes on 2 cores: make ablations [TABLE=8] [ON=imagenet]
	@test -d out/report/tables || $(MAKE) repro
	$(RUN) python -m selfclass.ablations run $(if $(TABLE),--table '$(TABLE)') $(if $(ON),--on '$(ON)')

clean: ## remove what can be made again (not .venv, not DVC's cache)
	rm -rf out .checkpoints dvc_plots build dist _docs *.egg-info
