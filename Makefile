# Everything a newcomer runs. Each target makes .venv when it is missing, installs what it needs into it and builds the
# extension in release mode; a stamp file in .venv stands for each finished step, so that a second run is quick.
#
#   make demo PYTHON=python3.12     choose the interpreter .venv is made from

PYTHON ?= python3
VENV ?= .venv
BENCH ?= $(filter-out %/compare.py %/instructions.py %/gpu.py %/goals.py,$(wildcard benches/[a-z]*.py)) benches/goals.py
# Those that write their table into the pages.
WRITING := benches/torch_step.py benches/weightings.py benches/floor.py benches/jax_cross_entropy.py \
  benches/linear_cross_entropy.py benches/goals.py
EVIDENCE := $(filter-out readme,$(basename $(notdir $(wildcard examples/evidence/*.py))))
QUICK_TESTS := $(addprefix tests/,weightings numpy torch jax package)
# How many processes run the Python tests; 0 for this one alone, as a debugger needs it.
PYTEST_JOBS ?= 2

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check
# Torch's CUDA build is large: a slow line needs patience, not a failure after 15 seconds.
pip_install := $(pip) install --quiet --timeout 120
# Two processes of tests share the cores: their OpenMP threads must not wait actively.
pytest = OMP_WAIT_POLICY=passive $(python) -m pytest -n $(PYTEST_JOBS) --dist worksteal $(PYTEST_ARGS)
# How many seconds `make fuzz` runs each target, and `make fuzz-python` tries calls; and which targets.
SECONDS ?= 60
FUZZ ?= $(basename $(notdir $(wildcard fuzz/targets/*.rs)))
# The part of the mutants that `make mutants` tries: about as many as ten minutes are enough for.
SHARD ?= 1/20
SLOW_OR_FAR := numeric:: boosting:: parallel:: the_gradient_in_place_is_the_separate_one threads_that_share_a_large_batch \
  the_root_is_found_for_many_sizes
# How many of the parameter sets of a test run with the oldest versions.
OLDEST_SETS ?= 1
# Rust keeps the paths of its sources for the messages of panics: those of this machine are of no use elsewhere.
without_paths := --remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)=cargo --remap-path-prefix=$(CURDIR)=rgd
host = $(shell rustc -vV | sed -n 's/^host: //p')
# Where a job builds the crate: the copy with a planted fault has a place of its own, since cargo does not put a finished
# build of one over that of the other.
built = target/$(if $(PLANT),planted/)$(1)
# Installs a program of cargo where it is missing.
installed = command -v $(1) >/dev/null 2>&1 || { echo "$(1) was not found: installing it, some minutes"; cargo install --locked --quiet $(1); }
say := @printf '\n== %s\n'

rust_sources := Cargo.toml $(wildcard Cargo.lock) $(shell find src -name '*.rs')
extension := $(wildcard python/rgd/_rgd*.so)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.NOTPARALLEL:

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.built $(VENV)/.group-demo ## Turn the dial against wrong labels: print the table, draw the picture, time the swap
	$(say) "running examples/demo.py (about a minute)"
	@$(python) examples/demo.py $(DEMO_ARGS)

.PHONY: evidence
evidence: $(VENV)/.built $(VENV)/.group-evidence ## Run the programs of examples/evidence, or one: make evidence ROW=dial; QUICK=1 for a smoke test
	@failed=; for row in $(or $(ROW),$(EVIDENCE)); do \
	  printf '\n== %s\n' "$$row"; \
	  $(python) "examples/evidence/$$row.py" $(if $(QUICK),--quick,--full) || failed="$$failed $$row"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi
	@$(if $(QUICK),,$(python) examples/evidence/readme.py)

.PHONY: test
test: $(VENV)/.built $(VENV)/.group-test ## Run the Rust tests, then the Python tests with README, notebook and doctests
	$(say) "cargo test: the kernels, without Python"
	@cargo test --quiet
	$(say) "pytest: 15,000 tests, about 8 minutes on two quiet cores"
	@$(pytest)

.PHONY: test-quick
test-quick: $(VENV)/.built $(VENV)/.group-test ## Run each Python test with one of its parameter sets, without slow ones, clients and evidence: a minute
	$(say) "pytest: 1,000 tests of weightings, NumPy, torch, JAX and the package, about a minute on two quiet cores"
	@$(pytest) --quick $(QUICK_TESTS)

.PHONY: test-oldest
test-oldest: ## Run the Python tests with the oldest supported versions, in an environment of their own
	@$(MAKE) --no-print-directory VENV=$(VENV)-oldest pytest-oldest

.PHONY: pytest-oldest
pytest-oldest: $(VENV)/.built $(VENV)/.group-oldest
	$(say) "pytest with $$($(python) --version) and the oldest supported versions: each test with $(OLDEST_SETS) of its parameter sets"
	@$(pytest) --few $(OLDEST_SETS)

.PHONY: test-isa
test-isa: $(VENV)/.built $(VENV)/.group-test ## Run the Rust tests, and a part of those of weightings, NumPy and torch, on each instruction set of this machine
	@for isa in $$($(python) -c 'from rgd import _rgd; print(*_rgd.available_isas())'); do \
	  printf '\n== %s\n' "RGD_ISA=$$isa: cargo test, then pytest"; \
	  RGD_ISA=$$isa cargo test --quiet && RGD_ISA=$$isa $(pytest) --quick tests/weightings tests/numpy tests/torch || exit 1; \
	done

# `fuzz` and `asan` need options of the compiler that a stable one has, but does not promise to keep.
.PHONY: fuzz
fuzz: | rust ## Run each fuzz target for SECONDS=60, or one: FUZZ=weights; PLANT=1 plants a fault that each must find
	@$(call installed,cargo-fuzz)
	@for target in $(FUZZ); do \
	  printf '\n== %s\n' "fuzzing $$target for $(SECONDS) seconds, after a build of some minutes"; \
	  mkdir -p target/fuzz/corpus/$$target target/fuzz/found; \
	  from=.; if [ -n "$(PLANT)" ]; then from=target/planted/crate; "$(PYTHON)" tools/plant.py $$target $$from || exit 1; fi; \
	  (cd $$from && RUSTC_BOOTSTRAP=1 cargo fuzz build --no-trace-compares --target-dir $(CURDIR)/$(call built,fuzz/build) $$target) || exit 1; \
	  RUST_BACKTRACE=0 $(call built,fuzz/build)/$(host)/release/$$target $(if $(PLANT),,target/fuzz/corpus/$$target) \
	    -max_total_time=$(SECONDS) -timeout=60 -print_final_stats=1 -verbosity=0 \
	    -artifact_prefix=target/$(if $(PLANT),planted,fuzz/found)/$$target- > target/fuzz/$$target.log 2>&1; status=$$?; \
	  grep -E -A1 'panicked|ERROR: AddressSanitizer|number_of_executed_units|written to' target/fuzz/$$target.log; \
	  if [ -n "$(PLANT)" ]; then \
	    [ $$status -ne 0 ] || { echo "$$target did not find the planted fault" >&2; exit 1; }; \
	    echo "$$target found the planted fault"; \
	  elif [ $$status -ne 0 ]; then \
	    echo "$$target found a fault: target/fuzz/$$target.log" >&2; exit 1; \
	  fi; \
	done

.PHONY: asan
asan: | rust ## Run the Rust tests under the address sanitizer; PLANT=1 plants a fault that it must find
	$(say) "cargo test with the address sanitizer"
	@mkdir -p target/asan; from=.; \
	if [ -n "$(PLANT)" ]; then from=target/planted/crate; "$(PYTHON)" tools/plant.py asan $$from || exit 1; fi; \
	(cd $$from && RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" \
	  cargo test --quiet --profile quick --lib --target $(host) --target-dir $(CURDIR)/$(call built,asan/tests)) > target/asan/log 2>&1; \
	status=$$?; grep -E 'ERROR: AddressSanitizer|^error|test result|panicked' target/asan/log; \
	if [ -z "$(PLANT)" ]; then \
	  [ $$status -eq 0 ] || { echo "a fault was found: target/asan/log" >&2; exit 1; }; \
	elif grep -q 'ERROR: AddressSanitizer' target/asan/log; then \
	  echo "the sanitizer found the planted fault"; \
	else \
	  echo "the sanitizer did not find the planted fault: target/asan/log" >&2; exit 1; \
	fi

# The sanitizer's library is gcc's: rustc links its own into programs only. It comes before all others, and so does the
# library of C++, for the exceptions of torch. Two tests give a kernel less stack, or less memory, than it takes here.
.PHONY: asan-python
asan-python: $(VENV)/.built $(VENV)/.group-test ## Run the tests of the NumPy front with an extension under the address sanitizer; PLANT=1 as above
	$(say) "building the extension with the address sanitizer"
	@from=.; if [ -n "$(PLANT)" ]; then from=target/planted/crate; "$(PYTHON)" tools/plant.py asan $$from || exit 1; fi; \
	(cd $$from && RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" PYO3_PYTHON="$(abspath $(python))" \
	  cargo rustc --quiet --profile quick --features python --lib --crate-type cdylib --target $(host) \
	  --target-dir $(CURDIR)/$(call built,asan/extension)) || exit 1; \
	rm -rf target/asan/python && mkdir -p target/asan/python && cp -r python/rgd target/asan/python/ && \
	rm -f target/asan/python/rgd/_rgd*.so && \
	cp $(call built,asan/extension)/$(host)/quick/librgd.so target/asan/python/rgd/_rgd.abi3.so
	$(say) "pytest of the NumPy front"
	@rm -f target/asan/report.*; \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0:log_path=$(CURDIR)/target/asan/report \
	  PYTHONMALLOC=malloc PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=target/asan/python \
	  $(python) -m pytest -q -p no:cacheprovider --quick tests/numpy $(PYTEST_ARGS) \
	  -k 'not stack_of_64_kib and not memory_that_is_not_there' > target/asan/python.log 2>&1; \
	status=$$?; cat target/asan/report.* 2>/dev/null | grep 'ERROR: AddressSanitizer'; found=$$?; \
	grep -E '^FAILED|^ERROR|passed' target/asan/python.log; \
	if [ -z "$(PLANT)" ]; then \
	  [ $$status -eq 0 ] && [ $$found -ne 0 ] || { echo "a fault was found: target/asan/" >&2; exit 1; }; \
	elif [ $$found -eq 0 ]; then \
	  echo "the sanitizer found the planted fault"; \
	else \
	  echo "the sanitizer did not find the planted fault: target/asan/python.log" >&2; exit 1; \
	fi

# Loom itself is optimised, since it runs a model thousands of times; the kernels, which the models do not use, are not.
.PHONY: loom
loom: | rust ## Run the models of what threads share, in every order of their steps; PLANT=1 plants a fault that they must find
	$(say) "the models, by loom, after a build of some minutes"
	@mkdir -p target/loom; from=.; \
	if [ -n "$(PLANT)" ]; then from=target/planted/crate; "$(PYTHON)" tools/plant.py loom $$from || exit 1; fi; \
	(cd $$from && RUSTFLAGS="--cfg loom --cfg rgd_baseline_only" CARGO_PROFILE_QUICK_DEBUG=false \
	  cargo test --quiet --profile quick --config 'profile.quick.package."*".opt-level=2' --lib --target-dir $(CURDIR)/$(call built,loom/build) models::) > target/loom/log 2>&1; \
	status=$$?; grep -E '^error|test result|FAILED|Causality|panicked' target/loom/log; \
	if [ -z "$(PLANT)" ]; then \
	  [ $$status -eq 0 ] || { echo "a fault was found: target/loom/log" >&2; exit 1; }; \
	elif grep -q 'a_job_ends.*FAILED' target/loom/log; then \
	  echo "the models found the planted fault"; \
	else \
	  echo "the models did not find the planted fault: target/loom/log" >&2; exit 1; \
	fi

# For one instruction set, since the kernels of the others are the same code: each mutant is built in half the time. The
# tests that are slow without optimisation, and those of modules that are not changed, run on the survivors alone.
.PHONY: mutants
mutants: | rust ## Change the kernels in one place at a time and run the Rust tests: a part, SHARD=1/20, in ten minutes
	@$(call installed,cargo-mutants)
	$(say) "the part $(SHARD) of the mutants: .cargo/mutants.toml says which there are"
	@export CARGO_TARGET_DIR=$(CURDIR)/target/mutants/build CARGO_PROFILE_QUICK_DEBUG=false PROPTEST_CASES=64 \
	  RUSTFLAGS="--cfg rgd_baseline_only" RUST_BACKTRACE=0; \
	mkdir -p target/mutants; rm -rf target/mutants/mutants.out target/mutants/again; \
	cargo mutants --jobs 1 --no-shuffle --sharding round-robin --output target/mutants $(MUTANTS_ARGS) \
	  --shard $$(echo $(SHARD) | awk -F/ '{ print ($$1 - 1) "/" $$2 }') -- --lib -- $(addprefix --skip=,$(SLOW_OR_FAR)); status=$$?; \
	[ $$status -eq 2 ] && [ -s target/mutants/mutants.out/missed.txt ] || exit $$status; \
	printf '\n== %s\n' "the survivors, with all tests"; unset PROPTEST_CASES; \
	sed 's/[][\.*^$$(){}?+|/]/\\&/g; s/.*/--re=^&$$/' target/mutants/mutants.out/missed.txt | \
	  xargs -d '\n' sh -c 'exec cargo mutants --jobs 1 --output target/mutants/again "$$@" -- --lib' again; \
	tried=$$(cat target/mutants/mutants.out/caught.txt target/mutants/mutants.out/timeout.txt target/mutants/mutants.out/missed.txt | wc -l); \
	survived=$$(cat target/mutants/again/mutants.out/missed.txt | wc -l); \
	echo "$$survived of $$tried mutants survived. One in ten changes no result, so a fifth may survive: look at each."; \
	[ $$((5 * survived)) -le $$tried ]

.PHONY: mutants-python
mutants-python: $(VENV)/.built $(VENV)/.group-test ## Change weightings, statistics, optax and boosting in one place at a time and run their tests: COUNT=30, SEED=1
	$(say) "mutants of python/rgd, in ten minutes: tools/mutate.py says which there are"
	@$(python) tools/mutate.py --count $(or $(COUNT),30) --seed $(or $(SEED),1)

.PHONY: test-gpu-static
test-gpu-static: $(VENV)/.built $(VENV)/.group-test ## Check the Triton programs without a GPU: in the interpreter, and compiled for each GPU
	$(say) "pytest: the programs in Triton's interpreter, every launch watched"
	@TRITON_INTERPRET=1 $(pytest) $(addprefix tests/torch/test_triton_,interpreted.py extras.py modes.py processes.py)
	$(say) "pytest: tests of the other backends, by the programs; those that need float64 are skipped"
	@RGD_BACKEND=triton TRITON_INTERPRET=1 $(pytest) --few 1 $(patsubst %,tests/torch/test_torch_%.py, \
	  bad_input changed_after_call checkpointing evaluation masked_labels)
	$(say) "pytest: the programs compiled for sm_80, sm_90a, sm_100, sm_120 and gfx942"
	@RGD_GPU_STATIC=1 $(pytest) tests/torch/test_triton_compiled.py

.PHONY: test-clients
test-clients: ## Run the tests of the clients of docs/clients.md, in an environment of their own
	@$(MAKE) --no-print-directory VENV=$(VENV)-clients pytest-clients

.PHONY: pytest-clients
pytest-clients: $(VENV)/.built $(VENV)/.group-clients
	$(say) "pytest of the clients"
	@KERAS_BACKEND=torch $(python) -m pytest tests/clients $(PYTEST_ARGS)

.PHONY: lint
lint: $(VENV)/.group-test $(VENV)/.group-lint | rust ## Check format, lints and types of both languages, and the workflows
	@cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || \
	  { echo "make lint needs rustfmt and clippy: run 'rustup component add rustfmt clippy'." >&2; exit 1; }
	$(say) "cargo fmt --check"
	@cargo fmt --check
	$(say) "cargo clippy: the kernels alone"
	@cargo clippy --quiet --all-targets -- -D warnings
	$(say) "cargo clippy: with the Python module"
	@PYO3_PYTHON="$(abspath $(python))" cargo clippy --quiet --all-targets --features python -- -D warnings
	$(say) "ruff check, ruff format --check"
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	$(say) "zizmor: the workflows"
	@$(VENV)/bin/zizmor --offline --quiet .github
	$(say) "pyright"
	@$(python) -m pyright --pythonpath $(python)

.PHONY: docs
docs: $(VENV)/.built $(VENV)/.group-docs ## Build the site from the pages, the docstrings and the notebooks, into target/site/html
	$(say) "building the site (a minute)"
	@$(python) docs/site/build.py

.PHONY: test-docs
test-docs: docs ## Look at every page of the site in headless Chromium, and leave screenshots in target/site/screenshots
	$(say) "pytest of the site"
	@$(python) -m pytest tests/site $(PYTEST_ARGS)

.PHONY: wheel
wheel: $(VENV)/.tools | rust ## Build the abi3 wheel into dist/ and try it in a clean environment without Rust
	$(say) "building the wheel"
	@rm -f dist/rgd-*.whl
	@$(python) -m maturin build --release --out dist --interpreter $(python)
	$(say) "trying the wheel in a throw-away environment"
	@$(python) tests/package/smoke_wheel.py dist/rgd-*.whl

.PHONY: wheels
wheels: $(VENV)/.tools $(VENV)/.group-wheels | rust ## Build what is published from Linux, the sdist and a wheel for glibc 2.28, and look through both
	$(say) "building the sdist, and from it the wheel for manylinux_2_28 (several minutes)"
	@rm -f dist/rgd-*.tar.gz dist/rgd-*manylinux*.whl
	@$(python) -m maturin sdist --out dist
	@rm -rf target/sdist && mkdir -p target/sdist && tar -xzf dist/rgd-*.tar.gz --strip-components 1 -C target/sdist
	@RUSTFLAGS="$(RUSTFLAGS) $(without_paths)" PATH="$(abspath $(VENV))/bin:$$PATH" \
	  $(abspath $(python)) -m maturin build --release --zig --compatibility manylinux_2_28 --interpreter $(abspath $(python)) \
	  --manifest-path target/sdist/Cargo.toml --target-dir target/manylinux --out dist
	$(say) "looking through them"
	@$(python) -m auditwheel show dist/rgd-*manylinux*.whl
	@$(VENV)/bin/abi3audit --strict --summary dist/rgd-*manylinux*.whl
	@$(python) tests/package/check_built.py dist/rgd-*.tar.gz dist/rgd-*manylinux*.whl
	$(say) "trying the wheel in a throw-away environment"
	@$(python) tests/package/smoke_wheel.py dist/rgd-*manylinux*.whl

.PHONY: release
release: ## Write a version and today's date, commit and tag: make release VERSION=0.2.0; DRY=1 changes nothing
	@$(PYTHON) tools/release.py "$(VERSION)" $(if $(DRY),--dry-run)

.PHONY: fuzz-python
fuzz-python: $(VENV)/.built $(VENV)/.group-test ## Compare random calls of every front with the equations: SECONDS=60, SEED=1
	$(say) "random calls of every front, for $(SECONDS) seconds"
	@$(python) fuzz/calls.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

.PHONY: coverage
coverage: $(VENV)/.built $(VENV)/.group-test $(VENV)/.group-coverage ## Lines of python/rgd that the tests run, each test with one of its parameter sets
	$(say) "pytest with coverage"
	@$(pytest) --few 1 --cov=python/rgd --cov-report=term:skip-covered --cov-report=html:target/coverage --cov-fail-under=95

.PHONY: bench
bench: $(VENV)/.built $(VENV)/.group-test ## Run the programs in benches/, or one: make bench BENCH=benches/...; WRITE=1 for the pages' tables
	@for program in $(BENCH); do \
	  printf '\n== %s\n' "$$program"; \
	  case "$(if $(WRITE),$(WRITING))" in *"$$program"*) write=--write;; *) write=;; esac; \
	  $(python) "$$program" $$write || exit 1; \
	done

.PHONY: bench-compare
bench-compare: $(VENV)/.built $(VENV)/.group-test ## Time this tree's steps against those of an older commit: make bench-compare REV=HEAD~5
	@$(python) benches/compare.py $(REV)

.PHONY: bench-instructions
bench-instructions: $(VENV)/.built $(VENV)/.group-test ## Count the interpreter's steps in calls of rgd.torch, and hold them against the budget
	$(say) "counting the interpreter's steps"
	@$(python) benches/instructions.py

.PHONY: clean
clean: ## Remove the environments and everything built
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-clients target dist python/rgd/_rgd*.so

# --- what the targets stand on ---

.PHONY: rust
rust:
	@command -v cargo >/dev/null 2>&1 || { \
	  echo "cargo was not found. The kernels are Rust: install a toolchain (https://rustup.rs), open a new shell, and" >&2; \
	  echo "run make again." >&2; exit 1; }

# A half-made .venv would be taken for a whole one: it is removed on failure.
$(python):
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "$(PYTHON) was not found. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "rgd needs Python 3.10 or newer; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)." >&2; \
	  echo "Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	$(say) "making $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "python -m venv failed. On Debian and Ubuntu it is a package of its own: apt install python3-venv" >&2; exit 1; }

# pip 25.1 is the first that reads [dependency-groups] in pyproject.toml.
$(VENV)/.tools: | $(python)
	$(say) "installing pip and maturin"
	@$(pip_install) --upgrade 'pip>=25.1' 'maturin>=1.9,<2'
	@touch $@

# In editable mode: a changed Python file needs no rebuild. A missing extension does, whatever the stamp says. One
# extension serves every Python: an environment that finds a new one links the package and builds nothing.
$(VENV)/.built: pyproject.toml $(rust_sources) $(if $(extension),,FORCE) | rust $(VENV)/.tools
	@if [ -n "$(extension)" ] && [ -z "$$(find $(rust_sources) pyproject.toml -newer '$(extension)')" ]; then \
	  echo "$(abspath python)" > "$$($(python) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rgd.pth"; \
	else \
	  printf '\n== %s\n' "building the Rust extension in release mode (a minute or two the first time)"; \
	  PIP_QUIET=1 VIRTUAL_ENV="$(abspath $(VENV))" $(python) -m maturin develop --release --quiet; \
	fi
	@touch $@

$(VENV)/.group-%: pyproject.toml | $(VENV)/.tools
	$(say) "installing what '$*' needs (with PyTorch: several minutes the first time)"
	@$(pip_install) --group $*
	@touch $@

.PHONY: FORCE
FORCE:
