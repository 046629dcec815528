# Every target does its own set-up. `make demo` runs the main job, `make test` is what CI runs.
.PHONY: demo test lint bench bench-registry bench-scheduler tools
.DEFAULT_GOAL := help

include $(wildcard make/*.mk)

help:
	@echo 'make demo         run a command in a real microVM, end to end (sets everything up)'
	@echo 'make test         lint and test everything (sets everything up)'
	@echo 'make bench        measure against baselines; writes target/bench/*.json'
	@echo 'make chaos-registry   kill, pause and cut off three replicas under load (SEED=, SECONDS=)'
	@echo 'make sim          years of failures in seconds (SEED=, STEPS=, RUNS=, TRACE=1)'
	@echo 'make chaos-scheduler  the same for a whole fleet and its jobs (SEED=, SECONDS=, JOBS=)'
	@echo 'make chaos-node  VMs begin and end while their vmhost is killed (SEED=, CYCLES=, GUESTS=)'
	@echo 'make bench-scheduler  only how fast jobs go through, beside fork/exec and Redis Streams'
	@echo 'make bench-registry  only the registry beside etcd, alone and as three replicas'
	@echo 'make guest-image  build the default image into ./images'
	@echo 'make tools        install what running needs'

tools:
	@scripts/setup.sh run

demo: tools guest-image
	cargo build -p mvm-ci
	scripts/demo.sh

lint:
	@scripts/setup.sh test
	cargo fmt --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings
	target/tools/bin/cargo-deny --offline --log-level error check bans licenses sources
	target/tools/python/bin/typos
	cd proto && ../target/tools/python/bin/buf lint
	scripts/check-nix.sh

# The real guest must run here: a missing QEMU or image is a failure, not a skip. BLIXARD_PYTHON has grpcio-tools and grpcurl.
test: export BLIXARD_REQUIRE_QEMU = 1
test: export BLIXARD_PYTHON = $(CURDIR)/target/tools/python/bin
test: lint guest-image
	cargo build --quiet --workspace --bins
	cargo test --quiet --workspace

bench: tools guest-image
	scripts/bench.sh

bench-registry:
	scripts/bench.sh registry

bench-scheduler:
	scripts/bench.sh latency jobs control
