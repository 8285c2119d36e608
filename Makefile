# make demo | test | bench | lint | format | docs    each sets itself up in .venv
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ISAS ?=
# Processes that share the tests, file by file: what a file compiles or trains for its tests is made once.
WORKERS ?= 2
SOURCES = $(shell find csrc tests/cuda_emulation -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

.PHONY: all demo test bench lint format docs inplace clean
all: $(VENV)/ready

# Editable install: rebuilt when the build files or the kernels change.
$(VENV)/ready: pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc tests/cuda_emulation -type f)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt scikit-build-core pybind11 cmake ninja
	$(RUN) -m pip install -q -c constraints.txt torch numpy
	$(RUN) -m pip install -q -c constraints.txt --no-build-isolation -C cmake.define.PYKERN_EMULATION=ON \
	  -e ".[lm,course,hf,test,docs]" onnxruntime onnx
	touch $@

demo: $(VENV)/ready
	$(RUN) examples/demo.py $(DEMO)

test: $(VENV)/ready
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

bench: $(VENV)/ready
	$(RUN) -m pip install -q -c constraints.txt onnxruntime onnx ctranslate2
	$(RUN) -m benchmarks

lint: $(VENV)/ready
	$(RUN) -m pip install -q -c constraints.txt ruff mypy clang-format
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)

format: $(VENV)/ready
	$(RUN) -m pip install -q -c constraints.txt ruff clang-format
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format . && $(VENV)/bin/clang-format -i $(SOURCES)

# The documentation as a site: site/index.html opens from the disk.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# Builds the extension into pykern/ for work on the kernels, with the packages that PYTHON has.
inplace:
	cmake -S . -B build/inplace -G Ninja -DPython_EXECUTABLE=$(shell command -v $(PYTHON)) \
	  -Dpybind11_DIR=$$($(PYTHON) -m pybind11 --cmakedir) -DPYKERN_EMULATION=ON $(if $(ISAS),"-DPYKERN_ISAS=$(ISAS)") \
	  $(if $(shell command -v ccache),-DCMAKE_CXX_COMPILER_LAUNCHER=ccache) >/dev/null
	cmake --build build/inplace
	cp --remove-destination build/inplace/_C*.so pykern/  # a process may be running the old one

clean:
	rm -rf build site $(VENV) pykern/_C*.so
