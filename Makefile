# Every task of a developer; `make help` lists them. `make run` and `make test` each work alone on a fresh machine
# that has Python 3.11 or newer (with its headers) and gcc: they make .venv, build, and do the job.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip
# The first interpreter that is new enough; name another with `make PYTHON=/path/to/python3`.
PYTHON = $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$name; break; }; done)

PYX := $(wildcard cext/*.pyx)
MODULES := $(PYX:cext/%.pyx=%)
MISSING := $(foreach module,$(MODULES),$(if $(wildcard sglfast/_$(module).*.so),,$(module)))
PROTOS := $(wildcard sglfast/modelexpress/*.proto)
MISSING_PROTOS := $(foreach stem,$(PROTOS:.proto=),$(if $(and $(wildcard $(stem)_pb2.py),$(wildcard $(stem)_pb2.pyi)),,$(stem)))
# What changes the compiled code besides the sources.
BUILD_FLAGS := $(SGLFAST_DEBUG) $(SGLFAST_SANITIZE) $(SGLFAST_CFLAGS)
ARGS :=

.PHONY: help run test test-fast soak check build icount bench san docs wheel clean FORCE

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  More arguments for a command: make run ARGS="--workers 2", make test ARGS="tests/test_floors.py -x"'

run: build ## start 4 simulated workers and the router, print what to try (Ctrl-C ends it)
	@exec $(BIN)/sglfast demo $(ARGS)

# Most of a test's time is waiting, so two files run at a time. 5: ARGS leave nothing to one of the two.
test: build $(VENV)/.installed-dev ## run every test
	@status=0; \
	$(PY) -m pytest -n 2 --dist loadfile -m 'not alone' $(ARGS) || { code=$$?; [ $$code = 5 ] || status=$$code; }; \
	$(PY) -m pytest -m alone $(ARGS) || { code=$$?; [ $$code = 5 ] || status=$$code; }; \
	exit $$status

test-fast: build $(VENV)/.installed-dev ## run the tests, without those that take more than 20 s
	$(PY) -m pytest -n 2 --dist loadfile -m 'not slow and not alone' $(ARGS)

soak: build $(VENV)/.installed-dev ## run the tests that use chance with new seeds, until one fails or Ctrl-C
	while SGLFAST_TEST_SEED=new $(PY) -m pytest -n 2 -m 'chance and not alone' $(ARGS); do :; done; exit 1

check: build $(VENV)/.installed-dev build/hints.log ## the one gate: format, lint, types, floors, tests, instruction counts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cython-lint cext
	$(BIN)/mypy
	$(BIN)/mypy $(wildcard bench/*.py)
	$(PY) -m mypy.stubtest $(MODULES:%=sglfast._%)
	@! grep 'performance hint' build/hints.log || { echo 'Cython sees a slow construct, see the lines above'; exit 1; }
	$(PY) -m pytest tests/test_floors.py
	$(MAKE) --no-print-directory test ARGS=--ignore=tests/test_floors.py
	@if command -v valgrind >/dev/null; then $(PY) bench/icount.py; \
	else echo 'SKIPPED: instruction counts need valgrind (apt-get install valgrind)'; fi
	@echo 'make check: all passed'

build: $(VENV)/.editable ## compile what changed; leaves .venv/bin/sglfast

icount: build $(VENV)/.installed-dev ## instructions per call against bench/icount.json (ARGS=--write to set new budgets)
	$(PY) bench/icount.py $(ARGS)

FIGURES := out/bench
bench: build $(VENV)/.installed-dev ## what BENCHMARKS.md shows, nginx beside it if nginx and wrk are there; pictures in out/bench
	@mkdir -p $(FIGURES)
	$(PY) -m pytest bench -o addopts=-q --benchmark-only
	$(PY) bench/prompt_path.py --plot $(FIGURES)/prompt_path.svg
	$(PY) bench/match_under_load.py --plot $(FIGURES)/match_under_load.svg
	$(PY) bench/index_events.py --plot $(FIGURES)/index_events.svg
	$(PY) bench/index_killed.py
	$(PY) bench/long_prompts.py
	@if command -v nginx >/dev/null && command -v wrk >/dev/null; then $(PY) bench/compare.py --plot $(FIGURES)/compare.svg $(ARGS) \
		&& $(PY) bench/streams.py --plot $(FIGURES)/streams.svg; \
	else echo 'SKIPPED: the comparison needs nginx and wrk (apt-get install nginx-light haproxy wrk)'; fi

# The sanitized modules live in a copy of the tree, so that the working ones stay as they are. The first line after the
# build proves that the tests use them: an installed copy elsewhere would win in silence.
SAN := build/san
SAN_TESTS = $(foreach module,$(MODULES),$(or $(wildcard tests/test_$(module).py tests/test_$(module)_*.py),\
	$(error cext/$(module).pyx has no tests/test_$(module).py)))
SAN_ENV = LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONMALLOC=malloc PYTHONDONTWRITEBYTECODE=1
san: $(VENV)/.installed-dev ## the compiled modules' tests under AddressSanitizer and UBSan, built apart
	@mkdir -p $(SAN)
	@rm -rf $(SAN)/tests $(SAN)/cext $(SAN)/sglfast/*.py*
	cp -Rp setup.py pyproject.toml README.md cext tests $(SAN)/
	tar -c --exclude='*.so' --exclude=__pycache__ sglfast | tar -x -C $(SAN)
	cd $(SAN) && SGLFAST_SANITIZE=1 $(abspath $(PY)) setup.py -q build_ext --inplace -j2
	cd $(SAN) && $(SAN_ENV) $(abspath $(PY)) -c 'import sys, importlib; [print(importlib.import_module(name).__file__) \
		for name in sys.argv[1:]]' $(MODULES:%=sglfast._%) | tee loaded.txt
	@! grep -v '^$(CURDIR)/$(SAN)/' $(SAN)/loaded.txt || { echo 'these are not the sanitized modules'; exit 1; }
	cd $(SAN) && $(SAN_ENV) $(abspath $(PY)) -m pytest -p no:cacheprovider $(SAN_TESTS) $(ARGS)

docs: build ## docs/flags.md and docs/sglang-router.md, from the settings
	$(PY) docs/reference.py

wheel: $(VENV)/.created ## dist/sglfast-*.whl, as the Dockerfile builds it
	$(PIP) wheel --no-deps --wheel-dir dist .

clean: ## remove what was built (to begin from nothing, remove .venv too)
	rm -rf build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks sglfast/_*.so sglfast/_*.c \
		sglfast/modelexpress/*_pb2.py sglfast/modelexpress/*_pb2.pyi
	find sglfast tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- steps behind the targets; each leaves a stamp, so that it runs again only when what it depends on changed ----

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo 'sglfast needs Python 3.11 or newer and finds none.' \
		'Install one, or name it: make PYTHON=/path/to/python3'; exit 1; }
	@command -v "$${CC:-gcc}" >/dev/null || { echo 'sglfast compiles C and finds no gcc (apt-get install gcc libc6-dev)'; exit 1; }
	@$(PYTHON) -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("include"), "Python.h").stat()' 2>/dev/null \
		|| { echo 'Python.h is missing for $(PYTHON) (apt-get install python3-dev)'; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo 'no virtual environment (apt-get install python3-venv)'; exit 1; }
	@touch $@

# Prints the requirements of pyproject.toml's parts named on the command line; the project itself is not one of them.
define REQUIREMENTS
import sys, tomllib
meta = tomllib.load(open("pyproject.toml", "rb"))
parts = {"build": meta["build-system"]["requires"], "run": meta["project"]["dependencies"],
         **meta["project"]["optional-dependencies"], **meta["dependency-groups"]}
print("\n".join(line for part in sys.argv[1:] for line in parts[part] if not line.startswith("sglfast[")))
endef
export REQUIREMENTS

$(VENV)/.installed-run: pyproject.toml $(VENV)/.created
	@$(PY) -c "$$REQUIREMENTS" build run plot modelexpress modelexpress-redis > $(VENV)/requirements.txt
	$(PIP) install --requirement $(VENV)/requirements.txt
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed-run
	@$(PY) -c "$$REQUIREMENTS" build run plot modelexpress modelexpress-redis dev > $(VENV)/requirements-dev.txt
	$(PIP) install --requirement $(VENV)/requirements-dev.txt
	@touch $@

build/.flags: FORCE
	@mkdir -p build
	@echo '$(BUILD_FLAGS)' | cmp -s - $@ || echo '$(BUILD_FLAGS)' > $@

build/.built: $(wildcard cext/* sglfast/*.pxd) setup.py build/.flags $(VENV)/.installed-run $(if $(MISSING),FORCE)
	@echo 'Compiling $(words $(MODULES)) modules, or those of them that changed'
	@$(if $(filter build/.flags setup.py,$?),rm -rf build/cython)
	$(PY) setup.py build_ext --inplace -j2 $(if $(filter build/.flags setup.py,$?),--force)
	@touch $@

# The modules of the ModelExpress schema, in the source tree beside it.
build/.proto: $(PROTOS) setup.py $(VENV)/.installed-run $(if $(MISSING_PROTOS),FORCE)
	@mkdir -p build
	SGLFAST_ONLY=none $(PY) setup.py -q build_proto
	@touch $@

# pip would compile every module once more, in silence: SGLFAST_ONLY names none of them.
$(VENV)/.editable: pyproject.toml setup.py $(VENV)/.installed-run | build/.built build/.proto
	SGLFAST_ONLY=none $(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

# Hints do not fail a build and are printed only when a file is translated: so translate all, apart, and keep the text.
build/hints.log: $(wildcard cext/* sglfast/*.pxd) setup.py $(VENV)/.installed-run
	@rm -rf build/hints && mkdir -p build/hints/sglfast && cp -Rp setup.py cext build/hints/ && cp -p sglfast/__init__.py sglfast/*.pxd build/hints/sglfast/
	cd build/hints && $(abspath $(PY)) setup.py --name > ../hints.log 2>&1 || { cat ../hints.log; exit 1; }
