# The vocabulary of the project. `make quickstart` and `make test` install what they miss.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
BENCH_INSTALLED := .venv/.installed-bench
FUZZ_INSTALLED := .venv/.installed-fuzz
LLAMA_INSTALLED := .venv/.installed-llama
FUZZ_SECONDS ?= 60
TESTS ?= tests
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal --untouched
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: help install model quickstart test test-rest test-all test-llama check format generated faults plots plot-runs check-layouts check-losses compare-losses bench bench-prepare bench-scaling bench-saving bench-startup check-gpu gpu-kit fuzz clean

help:
	@echo "make quickstart     train a small real model on the demo pairs and show what changed"
	@echo "make test           a test of every promise, in minutes (TESTS='tests/data tests/cli -x' for a part)"
	@echo "make test-rest      the slow tests, which make test leaves out"
	@echo "make test-all       every test"
	@echo "make test-llama     build llama.cpp from its source, once, in five minutes or more, and let it read what is exported"
	@echo "make faults         break runs in every way at every point and write docs/faults.md: the next of 8 rounds, an hour; goes on where it was broken off (FAULTS=--all)"
	@echo "make check          formatting, lint, types, floors, generated files"
	@echo "make format         format the code"
	@echo "make fuzz           search for inputs that break what reads them, FUZZ_SECONDS=60 for each of them"
	@echo "make check-layouts  losses of 50 steps of the real model, packed against padded"
	@echo "make check-losses   losses of a real run against an independent trainer's (PAIRS='file --adapter lora')"
	@echo "make compare-losses  20 steps of the real model with every loss, side by side (COMPARE='--losses dpo ipo')"
	@echo "make bench          speed and memory beside TRL 1.16 on the same work, about 100 minutes (BENCH='--repeats 1 --adapter lora'; on a GPU: '--device cuda')"
	@echo "make bench-prepare  speed of preparing pairs, beside TRL (BENCH='--data FILE --rows 20000')"
	@echo "make bench-scaling  time and memory by the number of pairs (BENCH='--pairs 64 1024')"
	@echo "make bench-saving   time of saving a checkpoint, beside writing it without any promise"
	@echo "make bench-startup  time of --help and of the report of a wrong configuration"
	@echo "make check-gpu      measure and prove on a GPU what tests cannot, in eight minutes; without one a dry run (CHECK_GPU='--only attention')"
	@echo "make gpu-kit        pack into .gpu/ what a machine with a GPU and torch, but no network, lacks for that"
	@echo "make generated      write the schema and the pages of settings, findings, losses, shapes and layouts again"
	@echo "make plots          draw the losses again"
	@echo "make plot-runs      train a healthy, an over-fitted and a diverged run of the real model and draw them (half an hour)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,oracle,check]'
	touch $@

model: $(MODEL)

$(MODEL): | $(INSTALLED)
	$(BIN)/python scripts/fetch_model.py

quickstart: install model
	$(BIN)/python scripts/quickstart.py

test: install model
	$(PYTEST) -m "not slow and not llama_cpp" $(TESTS)

test-rest: install model
	$(PYTEST) -m "slow and not llama_cpp" $(TESTS)

test-all: install model
	$(PYTEST) $(TESTS)

$(LLAMA_INSTALLED): $(INSTALLED)
	@echo "building llama-cpp-python from its source: five minutes on two cores, with a C++ compiler"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[llama]'
	touch $@

test-llama: $(LLAMA_INSTALLED) model
	$(PYTEST) -m llama_cpp $(TESTS)

faults: fuzz
	$(BIN)/python scripts/write_faults_page.py $(FAULTS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_floors.py
	$(BIN)/dpo config schema | diff - configs/schema.json
	$(BIN)/python scripts/write_settings_page.py --check
	$(BIN)/python scripts/write_findings_page.py --check
	$(BIN)/python scripts/write_diagnosis_page.py --check
	$(BIN)/python scripts/write_losses_page.py --check
	$(BIN)/python scripts/write_shapes_page.py --check

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generated: install
	$(BIN)/dpo config schema > configs/schema.json
	$(BIN)/python scripts/write_settings_page.py
	$(BIN)/python scripts/write_findings_page.py
	$(BIN)/python scripts/write_diagnosis_page.py
	$(BIN)/python scripts/write_losses_page.py
	$(BIN)/python scripts/write_shapes_page.py
	$(BIN)/python scripts/write_layouts_page.py

check-layouts: install model
	$(BIN)/python scripts/check_layouts.py

check-losses: install model
	$(BIN)/python scripts/check_losses.py $(PAIRS)

compare-losses: install model
	$(BIN)/python scripts/compare_losses.py $(COMPARE)

$(BENCH_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

plots: $(BENCH_INSTALLED)
	$(BIN)/python scripts/plot_losses.py

plot-runs: $(BENCH_INSTALLED) model
	$(BIN)/python scripts/plot_runs.py

bench: $(BENCH_INSTALLED) model
	PYTHONPATH=scripts $(BIN)/python -m benchmark $(BENCH)

bench-prepare: $(BENCH_INSTALLED) model
	PYTHONPATH=scripts $(BIN)/python -m benchmark.preparing $(BENCH)

bench-scaling: install model
	PYTHONPATH=scripts $(BIN)/python -m benchmark.scaling $(BENCH)

bench-saving: install model
	PYTHONPATH=scripts $(BIN)/python -m benchmark.saving $(BENCH)

bench-startup: install
	PYTHONPATH=scripts $(BIN)/python -m benchmark.startup

check-gpu: $(BENCH_INSTALLED)
	$(BIN)/python scripts/check_gpu.py $(CHECK_GPU)

gpu-kit: install model
	PYTHONPATH=scripts $(BIN)/python -m gpu.pack $(GPU_KIT)

# Of another Python than those that atheris knows, nothing is lost but the search.
$(FUZZ_INSTALLED): $(INSTALLED)
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	touch $@

fuzz: $(FUZZ_INSTALLED)
	$(BIN)/python -m tests.fuzz $(FUZZ_SECONDS) $(FUZZ)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info
