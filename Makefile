# Every target sets up what it needs: a virtual environment in .venv, from pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
FASHION := examples/fashion
SOURCES := flora export calibrate tests benchmarks examples

.PHONY: demo test lint format bench clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[cpu,openvino,rtx,train,bench,dev]'
	touch $@

# The main job on the embedded example: a trained ViT and its ranks become a verified bundle.
demo: $(VENV)/installed
	$(BIN)/flora build $(FASHION)/model --data $(FASHION)/calibration.tar -o $(DEMO)/supernet
	$(BIN)/flora materialize $(DEMO)/supernet --uniform-macs 40% -o $(DEMO)/compact
	$(BIN)/flora export $(DEMO)/compact --to onnx,tensorrt-rtx --eval-data $(FASHION)/test.tar -o $(DEMO)/bundle
	@echo "flora lies in $(BIN): source $(BIN)/activate puts it on your path."

# Files spread over two processes: tests have a thread each.
test: $(VENV)/installed
	$(BIN)/pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# All benchmarks but bench, compress, paper_road and quantization, which are long, or one: make bench NAME=factorization
bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py $(NAME)

clean:
	rm -rf $(VENV) $(DEMO)
