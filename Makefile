# make train       a vision transformer on real images with AdamW and with Shampoo4: accuracy, state bytes, a picture
# make test        most promises of the READMEs once: about 9 minutes on two cores
# make test-all    all tests: every host, rank count and configuration
# make test-slow   those that make test leaves out
# make test-gpu    the tests that need a CUDA device
# make test-versions  `make test` with the least versions that setup.cfg allows, then with the newest: tests/versions
# make test-peers  the tests that need packages of other optimizers and programs, which it installs
# make golden      record anew the bits that tests/golden holds, after a change that means to change numbers
# make lint        ruff and mypy
# make docs       the pages and an API page from docstrings, as a site: build/docs/index.html
# make soak        runs killed and resumed for 30 minutes, by chance
# make bench       step times, state bytes and memory of every mode of this optimizer and of others, which it installs
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin
READY = $(VENV)/.ready

# Number of pytest processes: one for each core, at most four.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
# DeepSpeed compiles nothing when it is installed.
export DS_BUILD_OPS = 0

.PHONY: train test test-all test-slow test-gpu test-versions test-minimum test-newest test-peers golden lint docs soak bench clean

# 4e-3 is the best learning rate of both, by factors of two.
TRAIN = $(BIN)/accelerate launch --config_file launch/configs/fsdp2.yaml --num_processes 2 --main_process_port 0 \
	launch/train_vit.py --overwrite_output_dir --per_device_train_batch_size 32 --num_train_epochs 10 --learning_rate 4e-3

train: $(READY)
	$(TRAIN) --optimizer adamw --output_dir runs/digits/adamw
	$(TRAIN) --optimizer shampoo4 --output_dir runs/digits/shampoo4
	$(BIN)/python launch/compare.py runs/digits/adamw runs/digits/shampoo4 --output runs/digits/comparison.png

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST)

test-slow: $(READY)
	$(PYTEST) -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest tests/gpu

# Each in a virtual environment of its own: 8 GB where pip's torch comes with CUDA.
test-versions: test-minimum test-newest

test-minimum test-newest: test-%:
	$(MAKE) test VENV=.venv-$* CONSTRAINTS=tests/versions/$*.txt

golden: $(READY)
	$(BIN)/python tests/golden/digests.py --write

# Some packages come without what they require: torchtitan and axolotl ask for older versions of datasets and transformers.
# timm comes only where there is a torchvision, which must be made for the same build of torch: without one, timm would break
# the command `accelerate`, which imports it. Its tests are skipped then.
test-peers: $(READY)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[launch,test,bench,peers]'
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c $(CONSTRAINTS) --no-deps torchtitan spmd_types axolotl addict
	if $(BIN)/python -c 'import torchvision' 2>/dev/null; then \
		$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c $(CONSTRAINTS) --no-deps timm; \
	fi
	$(BIN)/python -m pytest tests/ranks/test_low_bit_bases.py tests/ranks/test_programs.py tests/launch/test_benchmark.py \
		tests/launch/test_notebook.py tests/unit/test_timm.py tests/unit/test_lightning.py tests/unit/test_axolotl.py \
		tests/unit/test_trainer_logs.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[launch,docs]'
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c launch/docs -d build/doctrees . build/docs

soak: $(READY)
	$(BIN)/python tests/soak.py --minutes 30

bench: $(READY)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[launch,bench]'
	$(BIN)/python launch/benchmark.py modes

$(READY): setup.cfg $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[launch,test]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-minimum .venv-newest runs build *.egg-info
