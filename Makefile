# Everything a person types. Each target installs what it needs from the distribution, says so, and is quiet about
# it the second time.
#
#   make demo     moves a mounted, written-to disk through a pipe and proves the copy (under a minute, needs root)
#   make test     formatting, lints and every test
#   make check    formatting and lints alone
#   make crash    the crash simulator alone, with more states than `make test` takes; the counts are printed
#   make chaos    copies under fire: cut, flipped, stalled and killed
#   make fuzz     every fuzzer for a while
#   make bench    the figures of docs/benchmarks.md, measured here against other programs
#   make guest    the tests of mounted disks in a virtual machine, which GUEST=PROGRAM starts (ploop-cli/tests/in_guest.sh)
#   make docs     the crates' documentation
#   make nightly  the long versions of all tests

CARGO ?= cargo
# What tests and the demo run besides ploop itself: package names of Debian 12.
TEST_PACKAGES := e2fsprogs xfsprogs fio gdisk qemu-utils zstd util-linux fdisk dosfstools btrfs-progs
BENCH_PACKAGES := rsync libnbd-bin qemu-system-common nbdkit
export CARGO_TERM_COLOR ?= auto

# What a run of the tests counted, skipped and found, and what shows it: a mutant that was not found is a failure.
TARGET_FOLDER := $(or $(CARGO_TARGET_DIR),target)
RECORDS := $(addprefix $(TARGET_FOLDER)/tmp/,counts skips mutants)
define SHOW_RECORDS
@cat $(TARGET_FOLDER)/tmp/counts/*.txt
@$(CARGO) run --quiet --package ploop-core --example mutants
@$(CARGO) run --quiet --package ploop-testing --bin skips
endef

.PHONY: demo test check crash chaos fuzz bench guest docs nightly loom packages bench-packages clean

demo: packages
	@$(CARGO) build --release --quiet --package ploop-cli --package pcopy --bins --example demo
	@./target/release/examples/demo

test: packages check
	@rm -rf $(RECORDS)
	$(CARGO) test --workspace --quiet
	$(MAKE) --no-print-directory loom
	$(SHOW_RECORDS)

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- --deny warnings

# The write tracker under every interleaving the memory model allows.
loom:
	RUSTFLAGS="--cfg loom" $(CARGO) test --quiet --release --package ploop-core --target-dir target/loom --lib loom

crash:
	PLOOP_CRASH_STATES=4000000 PLOOP_CRASH_OPS_STATES=10000 PLOOP_HISTORIES=3000 \
	  $(CARGO) test --release --package ploop-core --test crash --test crash_ops -- --nocapture

chaos: packages
	PLOOP_CHAOS_TRIALS=200 $(CARGO) test --release --package pcopy --test faults --test stalls --test kill -- --nocapture

fuzz:
	$(CARGO) run --release --package ploop-fuzz -- canary
	$(CARGO) run --release --package ploop-fuzz -- smoke 300

bench: packages bench-packages
	$(CARGO) build --release --quiet --workspace
	$(CARGO) run --release --quiet --package ploop-benches

guest: packages
	GUEST="$(GUEST)" ploop-cli/tests/in_guest.sh $(TESTS)

docs:
	$(CARGO) doc --workspace --no-deps

nightly: packages check
	@rm -rf $(RECORDS)
	PLOOP_CRASH_STATES=50000000 PLOOP_CRASH_OPS_STATES=50000 PLOOP_HISTORIES=50000 PLOOP_MODEL_CASES=2000000 \
	  ROUNDS=3000 PLOOP_FUZZ_SECONDS=3000 PLOOP_CHAOS_TRIALS=10000 PLOOP_STALL_TRIALS=1000 PROPTEST_CASES=20000 \
	  $(CARGO) test --workspace --release
	$(MAKE) --no-print-directory loom guest
	$(SHOW_RECORDS)

define install_missing
	@missing=""; for package in $(1); do \
	  dpkg-query --show --showformat='$${db:Status-Status}' "$$package" 2>/dev/null | grep -qx installed || missing="$$missing $$package"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then echo "not a Debian system; please see to it that these are installed:$$missing"; exit 0; fi; \
	if [ "$$(id -u)" -ne 0 ]; then echo "please install (tests that need them say SKIP):$$missing"; exit 0; fi; \
	echo "installing from the distribution:$$missing"; \
	DEBIAN_FRONTEND=noninteractive; export DEBIAN_FRONTEND; \
	apt-get -qq update && apt-get -qq install --yes --no-install-recommends --no-remove $$missing >/dev/null \
	  || echo "could not install all of them; what needs them will say SKIP"
endef

packages:
	$(call install_missing,$(TEST_PACKAGES))

bench-packages:
	$(call install_missing,$(BENCH_PACKAGES))

clean:
	$(CARGO) clean
