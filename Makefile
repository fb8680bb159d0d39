# Every target sets up what it needs in .venv, from nothing but Python 3.10 or newer.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# LOCKED=1 installs the versions of requirements-dev.lock and checks their hashes; without it, what is newest.
LOCKED ?=
LOCK := requirements-dev.lock
EXTRAS := cpu images hf
# Threads on cores; which tests run is --scope (tests/scopes.py).
PYTEST := pytest -q -n auto --maxprocesses 8 --dist worksteal
LOWEST := .venv-lowest
# Those that call NumPy, onnx, onnx-graphsurgeon, ONNX Runtime, OpenCV or rich; the short ones, in which every backend and layout occurs.
LOWEST_TESTS = --scope quick $(addprefix tests/,test_boxes.py test_reference.py test_checkpoint.py test_files.py test_backends.py \
	test_extreme_numbers.py test_third_party.py test_detector.py test_verification.py test_cli.py)
# Of make fuzz: seconds for each target, and which targets (all).
SECONDS ?= 60
TARGET ?=

# Settings of the models/% rules:  make models/yolov8n.ort.onnx SIZE=640 ARGS="--score-threshold 0.3"
SIZE ?=
BATCH ?= 1,8,32
PRECISION ?=
ARGS ?=
CHECKPOINT ?=
# Of the plugin library: where TensorRT is, and GPUs to compile for (the last one also for later GPUs).
TENSORRT_ROOT ?=
CUDA_ARCHS ?= 80 86 89 90 100 120
GENCODE = $(foreach arch,$(CUDA_ARCHS),-gencode arch=compute_$(arch),code=sm_$(arch)) \
	-gencode arch=compute_$(lastword $(CUDA_ARCHS)),code=compute_$(lastword $(CUDA_ARCHS))
CHECKPOINTS ?=
IMAGE ?=
CALIBRATE ?=
FUSE = $(BIN)/python -m fusenms $< -o $@ --engine none $(if $(SIZE),--size $(SIZE)) $(if $(PRECISION),--precision $(PRECISION)) $(ARGS)

.PHONY: help demo test test-quick test-all test-lowest newest test-gpu check docs fuzz lock licences bench bench-tasks bench-gpu plugin format clean \
	faults soak
.DELETE_ON_ERROR:
.SECONDARY:

help: ## Show this help
	@sed -n 's/^\([a-z][a-z/%.-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-22s %s\n", $$1, $$2}'
	@echo "  make models/%.ort.onnx      models/%.pt or models/%.raw.onnx, fused for ONNX Runtime"
	@echo "  make models/%.trt.onnx      the same, fused for TensorRT (EfficientNMS_TRT)"
	@echo "  make models/%.portable.onnx the same, with neither NMS operator nor plugin"
	@echo "  make models/%.plugin.onnx   the same, for TensorRT with our own plugin FusedNMS"
	@echo "  make models/%.rtx           a TensorRT-RTX engine of models/%.portable.onnx"
	@echo "  make models/%.engine        a TensorRT engine of models/%.trt.onnx (TensorRT and a GPU are this machine's)"
	@echo "  Variables: PYTHON=$(PYTHON) TORCH=$(TORCH) SIZE= PRECISION= ARGS= BATCH=$(BATCH)"

demo: $(VENV)/.run ## Fuse, verify and run the embedded detector; pictures land in fusenms-demo/
	$(BIN)/python -m fusenms demo

test: $(VENV)/.dev ## Run the tests (CPU, no network), a thread for each core; ARGS=-n0 runs them one after the other
	OMP_NUM_THREADS=1 $(BIN)/python -m $(PYTEST) $(ARGS)

test-quick: $(VENV)/.dev ## The short ones, in less than a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m $(PYTEST) --scope quick $(ARGS)

test-all: $(VENV)/.dev ## All of them: whole products, long searches, checkpoints of ../shared/zoo; ARGS="--scope rest": what test leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m $(PYTEST) --scope all $(ARGS)

test-lowest: $(LOWEST)/.dev ## Some tests with the lowest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m $(PYTEST) $(or $(ARGS),$(LOWEST_TESTS))

newest: $(VENV)/.dev ## Bring every dependency to its newest version, but PyTorch, which stays TORCH, and what only PyTorch needs
	echo torch > $(VENV)/without.txt
	$(BIN)/uv pip compile -q --no-config --excludes $(VENV)/without.txt --upgrade --python $(BIN)/python --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --no-emit-package fusenms $(EXTRAS:%=--extra %) --extra dev pyproject.toml -o $(VENV)/newest.txt
	$(BIN)/python -m pip install -q --no-deps -r $(VENV)/newest.txt

fuzz: $(VENV)/.fuzz ## Fuzz the readers of files: make fuzz [SECONDS=60] [TARGET=metadata] [ARGS=--record]; finds land in fuzz-finds/
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py $(TARGET) --seconds $(SECONDS) $(ARGS)

licences: $(VENV)/.dev ## Check the licences of what is installed, and write docs/licences.md
	$(BIN)/python tests/licences.py $(ARGS)

lock: $(VENV)/.dev ## Write requirements-dev.lock anew, with the newest versions and their hashes
	echo torch > $(LOCK).without
	$(BIN)/uv pip compile -q --no-config --excludes $(LOCK).without --universal --upgrade --generate-hashes --python-version 3.10 --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --no-emit-package fusenms $(EXTRAS:%=--extra %) --extra dev pyproject.toml -o $(LOCK).new
	{ sed '/^[^#]/,$$d' $(LOCK); cat $(LOCK).new; } > $(LOCK).whole
	mv $(LOCK).whole $(LOCK) && rm $(LOCK).new $(LOCK).without

test-gpu: $(VENV)/.dev ## What only a GPU can show; fails where there is none
	$(BIN)/python -m pytest -q tests/gpu $(ARGS)

check: $(VENV)/.dev ## Lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs ## Build the documentation into site/, without network; a warning or broken link is an error
	$(BIN)/python -m sphinx -q -W --keep-going -E -b html -d build/doctrees docs site

bench: $(VENV)/.bench ## Time fusenms beside its peers: make bench CHECKPOINT=yolov8n.pt [IMAGE=FILE] [CALIBRATE=DIR]; writes docs/benchmarks.*
	@test -n "$(CHECKPOINT)" || { echo "name a YOLOv8-style checkpoint: make bench CHECKPOINT=yolov8n.pt"; exit 2; }
	$(BIN)/python tests/benchmarks/run.py $(CHECKPOINT) $(if $(IMAGE),--image $(IMAGE)) $(if $(CALIBRATE),--calibrate $(CALIBRATE)) $(ARGS)

bench-tasks: $(VENV)/.bench ## The same for masks, keypoints, oriented boxes: make bench-tasks CHECKPOINTS="A-seg.pt B-pose.pt"
	@test -n "$(CHECKPOINTS)" || { echo "name checkpoints with YOLOv8's head: make bench-tasks CHECKPOINTS=\"A-seg.pt B-pose.pt C-obb.pt\""; exit 2; }
	$(BIN)/python tests/benchmarks/tasks.py $(CHECKPOINTS) $(if $(IMAGE),--image $(IMAGE)) $(ARGS)

bench-gpu: $(VENV)/.dev ## Time the plugin's kernels on a GPU: make bench-gpu [ARGS="--tensorrt PYTHON"]; writes docs/benchmarks-gpu.md
	$(BIN)/python tests/benchmarks/gpu.py --out docs $(ARGS)

plugin: plugins/libfusenms_plugin.so ## Build the TensorRT plugin library: make plugin TENSORRT_ROOT=DIR (its include and lib), with nvcc

plugins/libfusenms_plugin.so: plugins/fused_nms_plugin.cu plugins/fused_nms.cu
	@test -n "$(TENSORRT_ROOT)" || { echo "say where TensorRT is: make plugin TENSORRT_ROOT=/usr/local/tensorrt"; exit 2; }
	nvcc -std=c++17 -O3 -shared -Xcompiler -fPIC -isystem $(TENSORRT_ROOT)/include $(GENCODE) $< -o $@ -L $(TENSORRT_ROOT)/lib -lnvinfer

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the virtual environments and what the tools left
	rm -rf $(VENV) $(LOWEST) fuzz-finds build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis fusenms-demo detections

models/%.ort.onnx: models/%.pt | $(VENV)/.run
	$(FUSE) --backend ort

models/%.trt.onnx: models/%.pt | $(VENV)/.run
	$(FUSE) --backend trt

models/%.portable.onnx: models/%.pt | $(VENV)/.run
	$(FUSE) --backend portable

models/%.plugin.onnx: models/%.pt | $(VENV)/.run
	$(FUSE) --backend plugin

models/%.plugin.onnx: models/%.raw.onnx | $(VENV)/.run
	$(FUSE) --backend plugin

models/%.ort.onnx: models/%.raw.onnx | $(VENV)/.run
	$(FUSE) --backend ort

models/%.trt.onnx: models/%.raw.onnx | $(VENV)/.run
	$(FUSE) --backend trt

models/%.portable.onnx: models/%.raw.onnx | $(VENV)/.run
	$(FUSE) --backend portable

models/%.rtx: models/%.portable.onnx | $(VENV)/.rtx
	$(BIN)/python -m fusenms engine $< -o $@ --builder rtx --batch $(BATCH)

models/%.plugin.engine: models/%.plugin.onnx | $(VENV)/.run
	$(BIN)/python -m fusenms engine $< -o $@ --builder trt --batch $(BATCH)

models/%.engine: models/%.trt.onnx | $(VENV)/.run
	$(BIN)/python -m fusenms engine $< -o $@ --builder trt --batch $(BATCH)

$(VENV)/.run: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("fusenms needs Python 3.10 or newer, found " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(LOCKED),$(BIN)/python -m pip install -q --no-deps --require-hashes -r $(LOCK))
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[cpu,export,images]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	$(BIN)/python -m pip install -q --only-binary :all: atheris || echo "atheris has no wheel for this Python: inputs are made at random"
	touch $@

# The lowest versions: uv resolves them (wheels only), from PyPI or the index in UV_DEFAULT_INDEX. PyTorch stays $(TORCH), since the
# lowest one on PyPI is its CUDA build (5 GB).
$(LOWEST)/.dev: pyproject.toml | $(VENV)/.dev
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q $(TORCH)
	$(BIN)/uv pip compile -q --no-config --resolution lowest-direct --only-binary :all: --python $(LOWEST)/bin/python \
	  $(EXTRAS:%=--extra %) --extra test pyproject.toml -o $(LOWEST)/lowest.txt
	$(BIN)/uv pip install -q --no-config --python $(LOWEST)/bin/python -r $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install -q --no-deps -e .
	touch $@

$(VENV)/.rtx: $(VENV)/.run
	$(BIN)/python -m pip install -q -e '.[rtx]'
	touch $@

$(VENV)/.bench: $(VENV)/.run tests/benchmarks/requirements.txt
	$(BIN)/python -m pip install -q -e '.[bench,openvino]'
	$(BIN)/python -m pip install -q -r tests/benchmarks/requirements.txt
	$(BIN)/python -m pip install -q --no-deps ultralytics torchvision || echo "peers that do not install are left out"
	touch $@

faults: $(VENV)/.dev ## Kills, full and read-only disks, little memory, no home: the long version of tests/test_faults.py
	FUSENMS_FAULTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/test_faults.py $(ARGS)

soak: $(VENV)/.dev ## 200,000 calls of a detector from 8 threads: answers equal, memory and descriptors flat; ARGS="--calls N"
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/soak.py $(ARGS)
