# Targets that need .venv create it.
PYTHON ?= python3.11
BIN := .venv/bin
DEMO := runs/demo
export MLFLOW_TRACKING_URI ?= sqlite:///$(CURDIR)/runs/mlflow.db

# Sources of the image; its tag ends in `-changes` if these files differ from the commit.
IMAGE_FILES := Dockerfile .dockerignore pyproject.toml setup.py requirements.txt README.md LICENSE src components pipelines
DOCKER_BUILD_ARGS ?= --network=host

.DEFAULT_GOAL := help
.PHONY: demo demo-docker test test-services test-docker test-faults bench lint ui docs image clean help requirements

demo: .venv/installed  ## The whole pipeline on painted scenes, 5 to 15 minutes on 2 cores: runs/demo/
	@$(BIN)/pixelclip toy --out $(DEMO)/toy --params params.yaml
	@$(BIN)/pixelclip pipeline run --images $(DEMO)/toy/images --labelled $(DEMO)/toy/toy --out $(DEMO) --params params.yaml
	@echo "Look at $(DEMO)/report.html, or at the run and the registry: make ui"

demo-docker: .venv/installed image  ## The demo in containers, with data from DVC on S3 and MLflow on PostgreSQL: runs/demo-docker/
	@servers=$$(mktemp -d) && PATH=$(CURDIR)/$(BIN):$$PATH PIXELCLIP_IMAGE=pixelclip:dev \
		$(BIN)/python tests/helpers/services.py $$servers deploy/demo_docker.sh $(CURDIR)/runs/demo-docker

test: .venv/installed  ## All fast tests, in two processes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-services: .venv/installed  ## Tests against real S3, PostgreSQL, MLflow, DVC and Chromium (started and stopped by the tests)
	@$(BIN)/python -m pytest -m services

test-docker: .venv/installed  ## Tests that need a Docker engine and the image of `make image`
	@$(BIN)/python -m pytest -m docker

bench: .venv/installed  ## Speed and memory against baselines: a table and bench/results.json
	@$(BIN)/python -m bench

test-faults: .venv/installed  ## Kills, signals, full disks, outages and damaged bytes; an hour
	@rm -f runs/faults.json
	@$(BIN)/python -m pytest -m slow tests/faults; status=$$?; $(BIN)/python tests/helpers/faults.py; exit $$status

lint: .venv/installed  ## Ruff and the type checker
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

ui: .venv/installed  ## MLflow's UI with the runs of this folder
	@$(BIN)/python -c 'from pixelclip.tracking import pages, server; \
		print("Open", pages.experiment_page("http://127.0.0.1:5000", server.experiment_id(server.connect())))'
	@$(BIN)/mlflow ui --backend-store-uri $(MLFLOW_TRACKING_URI)

docs: .venv/installed  ## The documentation as a site: runs/site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet && echo "Open runs/site/index.html"

image:  ## The container image pixelclip:VERSION-COMMIT, also tagged :latest and :dev (the default of the components)
	@version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml); \
	revision=$$(git rev-parse HEAD 2>/dev/null || echo unknown); \
	changed=$$(git status --porcelain -- $(IMAGE_FILES) 2>/dev/null | grep -q . && echo changes); \
	tag=pixelclip:$$version-$$(echo $$revision | cut -c1-12)$${changed:+-$$changed}; \
	docker build $(DOCKER_BUILD_ARGS) --build-arg VERSION=$$version \
		--build-arg PIXELCLIP_REVISION=$$revision$${changed:++$$changed} -t $$tag -t pixelclip:latest -t pixelclip:dev . && \
	docker image inspect --format "$$tag  {{.Size}} bytes  {{.Id}}" $$tag

clean:  ## Remove .venv and all outputs
	rm -rf .venv runs data build pixelclip.egg-info

help:  ## List all targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

requirements: .venv/installed  ## Pin the newest allowed versions in requirements.txt
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-emit-index-url --no-annotate \
		--custom-compile-command "make requirements" --upgrade -q -o requirements.txt

.venv/installed: requirements.txt pyproject.toml setup.py
	@echo "installing into .venv (about 6 GB, a few minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	@$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -r requirements.txt
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@
