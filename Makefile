# Two commands do everything on a fresh Debian machine:
#   make demo   set up, then live-migrate a running KVM guest and print the timeline
#   make test   set up, then run every check and every test
# The others are parts of these, or longer versions.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
export CARGO_TERM_COLOR ?= auto
SKIPPED := $(CURDIR)/target/skipped-tests.txt

.PHONY: demo test setup lint unit doc package skipped conformance-full lab bench fuzz-smoke simulate

setup:
	@scripts/setup

demo: setup
	@cargo build --quiet --release --package qevm-conformance
	@target/release/qevm-conformance demo

test: setup lint unit doc package
	@$(MAKE) --no-print-directory skipped

lint: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy -p qevm-wire --features tokio --all-targets -- -D warnings
	cargo clippy --manifest-path fuzz/Cargo.toml --target-dir target --all-targets -- -D warnings
	@scripts/engine-dependencies
	@scripts/decode-loops
	@scripts/no-std
	@scripts/features
	@scripts/rooms
	@scripts/columns
	@scripts/imports
	@scripts/api
	@scripts/msrv

unit: setup
	@mkdir -p target && rm -f $(SKIPPED)
	QEVM_SKIPPED_TESTS=$(SKIPPED) scripts/watched 900 cargo test --workspace --no-fail-fast
	scripts/watched 900 cargo test -p qevm-wire --features tokio
	scripts/watched 900 cargo test --manifest-path fuzz/Cargo.toml --target-dir target

doc: setup
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet
	RUSTDOCFLAGS="-D warnings" cargo doc -p qevm-wire --features tokio --no-deps --quiet

# What is published: licences, and packages that hold all that they need.
package: setup
	QEVM_SKIPPED_TESTS=$(SKIPPED) scripts/deny
	cargo package --quiet --workspace --no-verify --allow-dirty

# Says by name and count which tests could not run on this machine.
skipped:
	@if [ -s $(SKIPPED) ]; then \
		echo "$$(wc -l < $(SKIPPED)) tests were SKIPPED on this machine:"; sed 's/^/  /' $(SKIPPED); \
	else echo "0 tests were skipped."; fi

conformance-full: setup
	scripts/msrv --build
	rustup target add x86_64-unknown-none && scripts/no-std
	scripts/features --test
	cargo deny --version || cargo install --locked cargo-deny
	QEVM_REQUIRE_DENY=1 scripts/deny
	rm -rf target/clone && git clone --quiet . target/clone
	cargo package --manifest-path target/clone/Cargo.toml --workspace --offline --target-dir target
	QEVM_WORST=full cargo test --release --package reference-vmm --test kvm -- worst
	cargo run --release --package qevm-conformance -- matrix --full
	cargo run --release --package qevm-conformance -- channels --full
	cargo run --release --package qevm-conformance -- trial
	cargo run --release --package qevm-conformance -- pairs
	cargo run --release --package qevm-conformance -- cores
	cargo run --release --package qevm-conformance -- crash
	cargo run --release --package qevm-conformance -- targets
	cargo run --release --package qevm-conformance -- peer --full
	cargo run --release --package qevm-conformance -- lifecycle --full
	cargo run --release --package qevm-conformance -- toy --full
	cargo run --release --package qevm-conformance -- lab

# Dirty log, dirty rings and VFIO devices in an emulated machine whose KVM works as on hardware.
lab: setup
	cargo run --release --package qevm-conformance -- lab

# Reading a stream of 1 GiB next to analyze-migration.py. On a machine that does nothing else.
bench: setup
	cargo run --release --package qevm-conformance -- bench decode
	cargo run --release --package qevm-conformance -- bench migrate

# Every fuzz target for a minute each, from its committed seeds.
fuzz-smoke:
	scripts/fuzz-smoke 60

# A million simulated migrations; `make test` has ten thousand.
simulate: setup
	QEVM_SIMULATED_MIGRATIONS=1000000 cargo test --release --package qevm-migration --lib testing::
