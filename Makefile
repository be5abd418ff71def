# Everything from a fresh clone; python3 (with venv) and make are all that must be there.
#
#   make demo    build, then see an ordinary program become durable and survive SIGKILL
#   make test    build, then all tests
#   make fuzz    build, then the log on a simulated disk, seed after seed until stopped; SEED=… repeats one
#   make fuzz-ring   build, then a client that mutates its live ring, 10 million times; SEED=… repeats a run
#   make bench   build, then the figures beside this machine's physical limits
#   make bench-peers   build, install the peers from Debian if they are missing, then the figures beside theirs
#   make check   formatting, lint, the cross-built aarch64 libraries, and the ring's model in more depth
#   make build   everything into .venv, with .venv/bin/elgate

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
MACHINE := $(shell uname -m)

# The same processor that hatch_build.py compiles for.
ZIG_CPU_x86_64 := x86_64_v2
ZIG_CPU_aarch64 := baseline+crc
export ZIG_LOCAL_CACHE_DIR := $(CURDIR)/.zig-cache
export ZIG_GLOBAL_CACHE_DIR := $(CURDIR)/.zig-cache/global
# Else each Python process, and tests start thousands, would compile its modules anew.
unexport PYTHONDONTWRITEBYTECODE
ZIG := $(RUN) -m ziglang
# With a limit: a test that hangs is a test that fails.
ZIG_TEST := timeout 300 $(ZIG) test -lc -fllvm -mcpu=$(ZIG_CPU_$(MACHINE)) -Icore/include

NATIVE_SOURCES := hatch_build.py $(shell find core -name '*.zig' -o -name '*.h')
# A header's test is part of its library's root.
ZIG_TESTS := $(filter-out core/src/header_%,$(sort $(wildcard core/src/*_test.zig)))

.PHONY: build built demo test test-zig test-client-sanitized test-ring-model test-build test-python fuzz fuzz-ring bench bench-peers check clean $(ZIG_TESTS:%=test-%)
.DELETE_ON_ERROR:

build:
	@$(MAKE) --jobs=2 --no-print-directory built

built: $(VENV)/.native $(VENV)/.installed
	@:

# What pyproject.toml names under [build-system]: the compiler first, so that it can work while pip does.
BUILD_REQUIRES := $(shell sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | sed 's/", "/" "/g')
PIP_INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check

# Made anew when what it must hold changes.
$(VENV)/.compiler: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(BUILD_REQUIRES)
	touch $@

$(VENV)/.native: $(VENV)/.compiler $(NATIVE_SOURCES)
	$(RUN) hatch_build.py
	touch $@

# The package's hook would compile what the rule above compiles.
INSTALL_EDITABLE := HATCH_BUILD_NO_HOOKS=true $(PIP_INSTALL) --no-build-isolation --editable
$(VENV)/.installed: $(VENV)/.compiler
	$(INSTALL_EDITABLE) '.[develop]'
	touch $@

demo: build
	$(VENV)/bin/elgate demo

# pytest has both cores to itself: some of its tests are about time.
test:
	$(MAKE) --jobs=2 --output-sync=target built test-build test-zig
	$(MAKE) test-python

test-zig: test-client-sanitized $(ZIG_TESTS:%=test-%) test-ring-model

$(ZIG_TESTS:%=test-%): test-%: $(VENV)/.compiler
	$(ZIG_TEST) $*

# The client once more under ThreadSanitizer, which holds signals back: those are tested above. It finds nothing without
# -fllvm; its verdict is the exit code. It is written in C++, so the compiler would compile the C++ library for it, for
# half a minute of both cores, of which nothing is linked: here it finds the sources empty.
test-client-sanitized: $(VENV)/.compiler
	@rm -rf .zig-cache/sanitizer && mkdir -p .zig-cache/sanitizer
	@cp -rs "$$($(RUN) -c 'import os, ziglang; print(os.path.dirname(ziglang.__file__))')/lib" .zig-cache/sanitizer
	@cd .zig-cache/sanitizer/lib && find libcxx/src libcxxabi/src -name '*.cpp' -delete -exec touch {} +
	$(ZIG_TEST) --zig-lib-dir .zig-cache/sanitizer/lib -fsanitize-thread core/src/client_test.zig

# The ring's protocol, in all orders but for so many steps out of turn.
STEPS_OUT_OF_TURN ?= 1
test-ring-model: $(VENV)/.compiler
	timeout 600 $(ZIG) run -lc -fllvm -mcpu=$(ZIG_CPU_$(MACHINE)) -Icore/include core/src/ring_model.zig -- $(STEPS_OUT_OF_TURN)

# The engine with its test doors open, which tests in integration/ then find compiled.
test-build: $(VENV)/.compiler
	$(RUN) hatch_build.py --test-build --output .zig-cache/test-build

# More than processors: tests wait, too, for a disk or for what they have killed.
PYTEST_WORKERS ?= $(shell echo $$(($$(nproc) * 3 / 2)))
test-python: build
	$(RUN) -m pytest -n $(PYTEST_WORKERS) --dist worksteal

# One core, until ctrl-C. SEED=… runs that seed alone and tells what happens; MUTANT=… breaks the log on purpose
# (core/src/engine/wal/mutant.zig), SEEDS=… ends after so many.
fuzz: export SEED := $(SEED)
fuzz: export SEEDS := $(SEEDS)
fuzz: export MUTANT := $(MUTANT)
fuzz: build
	$(ZIG) build-exe -OReleaseSafe -lc -fllvm -mcpu=$(ZIG_CPU_$(MACHINE)) core/src/wal_fuzz.zig -femit-bin=.zig-cache/wal_fuzz
	.zig-cache/wal_fuzz

# SEED=… repeats a run as far as the order of two processes allows, MUTATIONS=… ends after so many.
fuzz-ring: export SEED := $(SEED)
fuzz-ring: export MUTATIONS := $(MUTATIONS)
fuzz-ring: build
	PYTHONPATH=integration $(RUN) integration/ring_fuzz.py

bench: build
	$(VENV)/bin/elgate bench ring
	$(VENV)/bin/elgate bench wal

# BENCH_PEERS=--json, --docs (writes the tables and the plot in docs/ anew), or what `python -m peers --help` says. A peer
# that could not be installed fails there, by name.
bench-peers: build
	-ci/install-peers
	$(INSTALL_EDITABLE) '.[bench]'
	PYTHONPATH=integration $(RUN) -m peers $(BENCH_PEERS)

check: build
	$(INSTALL_EDITABLE) '.[check]'
	$(ZIG) fmt --check core
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) hatch_build.py --machine aarch64 --output .zig-cache/aarch64
	$(MAKE) test-ring-model STEPS_OUT_OF_TURN=2

clean:
	rm -rf $(VENV) .zig-cache dist daemon/elgate/daemon/*.so daemon/elgate/daemon/*_declarations.py \
		sdks/python/elgate/*.so sdks/python/elgate/*_declarations.py
