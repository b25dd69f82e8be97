# `make help` lists the targets. Set-up is testbed/bootstrap; everything it makes is under build/ and .venv/.
.DEFAULT_GOAL := help
.PHONY: help run demo test check test-guest conformance mutants bench bench-full soak setup driver driver-check image shell tcpdump wire ctl fmt clean

export KERNEL ACCEL QEMU NIC SEED KERNELS
PY := .venv/bin/python
HOST := testbed/bootstrap --only-host
# whatever ends make, even SIGKILL, ends what it started
RUN := setpriv --pdeathsig TERM -- $(PY)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: KERNEL=6.1|6.12|7.2|another  ACCEL=kvm|tcg  QEMU=system|trixie|bookworm|PATH"
	@echo "           NIC=\"--faults FILE ...\" (run, demo, shell): options for the NIC"
	@echo "           ARGS=... (tcpdump, wire, ctl, pytest, conformance, mutants, bench)  KERNELS=\"6.1 7.2\" (conformance)"
	@echo "Missing Debian packages are installed by apt-get, as root or through sudo; nothing else needs root."

run: ## demonstration, then a shell in the guest (needs nothing beforehand)
	@$(HOST) && exec $(RUN) -m testbed.run --shell auto

demo: ## the demonstration alone; writes build/demo.json
	@$(HOST) && exec $(RUN) -m testbed.run --shell never

test: check test-guest ## everything: `check`, then the tests in guests

check: ## format, lint, types, unit tests (no root, no VM; under a minute)
	@$(HOST)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	$(PY) -m pytest -q -n auto --dist worksteal tests/unit tests/abi tests/device $(ARGS)

test-guest: setup driver-check ## the tests that boot guests
	@# Two guests at a time, on a busy machine: what fails is run once more, by itself and said so; it must pass then.
	$(RUN) -m pytest -v -n 2 --dist loadfile --no-loadscope-reorder tests/guest $(ARGS) || { echo "== again, the failed ones only =="; \
	    $(RUN) -m pytest -v --last-failed --last-failed-no-failures none tests/guest $(ARGS); }

conformance: setup driver-check ## which items of the kernel's checklist hold, on every kernel (three quarters of an hour); writes build/conformance.json
	@exec $(RUN) -m tests.conformance $(ARGS)

mutants: ## break device and driver on purpose, and see the tests notice; writes build/mutants.json
	@$(HOST) && exec $(RUN) -m tests.mutants $(ARGS)

bench: ## measure (15 minutes); a table, and build/bench.json. ARGS="--only GROUP,...", "--list", "--smoke"
	@$(HOST) && exec $(RUN) -m bench $(ARGS)

bench-full: ## measure everything, with more rounds (70 to 100 minutes)
	@$(HOST) && exec $(RUN) -m bench --full $(ARGS)

soak: setup ## disorder in a hundred settings and 2,000 sockets at once, on every kernel (half an hour); SEED=n, ARGS
	$(RUN) -m tests.soak $(ARGS)

setup: ## prepare host, guest image, driver and QEMU
	@testbed/bootstrap

driver: ## build the driver for KERNEL
	@testbed/bootstrap

driver-check: ## build the driver with W=1 and sparse for all kernels, and run checkpatch
	@$(HOST) && exec $(PY) -m testbed.assets.driver

image: setup ## same as setup

shell: ## boot a guest with the NIC, without the demonstration, and open a shell in it
	@$(HOST) && exec $(RUN) -m testbed.run --shell only

tcpdump: ## tcpdump on the wire of a running `make run`; ARGS="-vv port 443"
	@$(HOST) >/dev/null && exec $(PY) -m testbed.watch tcpdump $(ARGS)

wire: ## a shell at the NIC's other end, in a running `make run`; ARGS="curl -k https://198.51.100.2/" runs that instead
	@$(HOST) >/dev/null && exec $(PY) -m testbed.watch wire $(ARGS)

ctl: ## ask the NIC of a running `make run`; ARGS="stats", "history", "personality --rx NAME", "faults set FILE"
	@$(HOST) >/dev/null && exec $(PY) -m testbed.watch ctl $(ARGS)

fmt: ## rewrite the Python code in the house format
	.venv/bin/ruff format . && .venv/bin/ruff check --fix .

clean: ## remove build/ (image, caches, results); .venv stays
	rm -rf build
