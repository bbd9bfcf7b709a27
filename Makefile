# The few commands a developer needs. Each says what it does; `make` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

# The binaries find libtorch from where they stand, so they must stand in this checkout.
export CARGO_TARGET_DIR := $(CURDIR)/target
# These would replace the flags of .cargo/config.toml, and with them the path to libtorch.
unexport RUSTFLAGS CARGO_ENCODED_RUSTFLAGS

PYTHON := .deps/python/bin/python
BENCH_PYTHON := .deps/bench/bin/python
MODEL := models/smollm2/build/smollm2-moe
# Scripts that bash runs.
SCRIPTS := .ci/run $(wildcard deploy/*.sh)

.PHONY: help setup demo test drills bench lint fmt golden deploy-check image-check clean-deps
.PHONY: setup-build setup-python setup-etcd demo-model check-fmt check-clippy check-deps check-scripts build build-programs test-rust test-python

help: ## List these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-14s %s\n", $$1, $$2 }'

setup: setup-build setup-python ## Bring libtorch, protoc, the Python environment and, where possible, etcd
	@deploy/setup.sh etcd || echo "no etcd here: make demo will use the embedded store, make test needs one" >&2

demo: ## Start a cluster of one router and four workers, ask it a question, stop it
	@deploy/demo.sh

test: setup-build setup-python setup-etcd check-fmt check-clippy build demo-model test-rust test-python ## Run all checks and tests (needs a real etcd)
	@echo "make test: everything passed"

drills: setup-build setup-etcd build-programs ## Break clusters under load, at full length (half an hour), and print the table of it
	@rm -rf target/drills; status=0; \
	CONCLAVE_DRILLS=full cargo test --workspace --test drills --locked -- --test-threads=1 --nocapture || status=$$?; \
	cat target/drills/*.md; exit $$status

# WRITE=docs/benchmarks.md replaces that page; ONLY=expert measures one mode (bench/README.md lists them).
bench: setup-build setup-python demo-model ## Measure against peers and limits in one run (JSON=1, WRITE=FILE, ONLY=MODE)
	@deploy/setup.sh bench || echo "transformers cannot be had here: its figures will be missing" >&2
	@deploy/setup.sh llama || echo "llama.cpp cannot be had here: its figures will be missing" >&2
	@cargo build --workspace --bins --release --locked
	@target/release/conclave-bench $(or $(ONLY),all) --model $(MODEL) $(if $(JSON),--json) $(if $(WRITE),--write $(WRITE))
	@cargo run --quiet --release --package conclave-placement --example plan_scale --locked >&2

lint: setup-build check-fmt check-clippy check-deps check-scripts ## Check formatting, clippy, dependencies and shell scripts

fmt: ## Format all Rust code
	cargo fmt --all

golden: ## Make the reference outputs in tests/golden anew (needs the whole of torch, 2.5 GB)
	@deploy/setup.sh bench
	$(BENCH_PYTHON) tests/golden/generate.py

deploy-check: ## Check chart, Dockerfile and manifests without a cluster
	@deploy/check.sh

image-check: ## Build the image from built programs and run it beside a real etcd (needs root, buildah, mmdebstrap)
	@deploy/image-check.sh

clean-deps: ## Remove what setup brought (.deps)
	rm -rf .deps

# --- the steps ---

setup-build:
	@deploy/setup.sh build

setup-python:
	@deploy/setup.sh python

setup-etcd:
	@deploy/setup.sh etcd || { \
	  echo "make test needs a real etcd (3.4 or later) on PATH, and it could not be installed here. On Debian and Ubuntu:"; \
	  echo "  sudo apt-get install etcd-server"; \
	  echo "elsewhere: unpack a release from https://github.com/etcd-io/etcd/releases and put its folder on PATH."; \
	  exit 1; } >&2

demo-model:
	@$(PYTHON) models/smollm2/convert.py

check-fmt:
	@if cargo fmt --version >/dev/null 2>&1; then cargo fmt --all --check; \
	else echo "rustfmt is not installed: formatting is not checked (rustup component add rustfmt)" >&2; fi

check-clippy:
	@if cargo clippy --version >/dev/null 2>&1; then cargo clippy --workspace --all-targets --locked -- -D warnings; \
	else echo "clippy is not installed: lints are not checked (rustup component add clippy)" >&2; fi

# The advisory database is on the network; what it says must not depend on whether this machine reaches it.
check-deps:
	@if ! cargo deny --version >/dev/null 2>&1; then \
	  echo "cargo-deny is not installed: licences and banned crates are not checked" >&2; \
	else \
	  cargo deny --log-level error check --allow duplicate licenses bans sources; \
	  if cargo deny --log-level off fetch db >/dev/null 2>&1; then cargo deny --log-level error check advisories; \
	  else echo "the advisory database is out of reach: advisories are not checked" >&2; fi; \
	fi

check-scripts:
	@if command -v shellcheck >/dev/null; then shellcheck $(SCRIPTS); \
	else echo "shellcheck is not installed: scripts are not checked" >&2; fi

build:
	@cargo build --workspace --all-targets --locked

build-programs:
	@cargo build --workspace --bins --locked

# The same tests either way. Without nextest, two at once stands in for its test groups; nextest runs no doc tests.
test-rust:
	@if cargo nextest --version >/dev/null 2>&1; then \
	  cargo nextest run --workspace --locked $(if $(CI),--profile ci) && cargo test --workspace --doc --locked --quiet; \
	else \
	  RUST_TEST_THREADS=2 cargo test --workspace --locked --no-fail-fast; \
	fi

test-python:
	@$(PYTHON) -m unittest discover --start-directory models/smollm2 --pattern 'test_*.py'
