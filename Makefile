# Every target sets up what it needs: a virtual environment in .venv, from pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
FASHION := examples/fashion
SOURCES := flora export calibrate tests benchmarks examples

# What drives the pages of reports in the tests; they are skipped where it is missing and cannot be installed.
BROWSER := chromium

.PHONY: demo test browser lint format bench clean

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
test: $(VENV)/installed browser
	$(BIN)/pytest --numprocesses 2 --dist loadfile

browser:
	@command -v $(BROWSER) > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(BROWSER) fonts-dejavu-core; } \
		|| echo "$(BROWSER) is missing and was not installed: tests in a browser are skipped."

lint: $(VENV)/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# All benchmarks but the long ones (LONG in benchmarks/run.py), or one: make bench NAME=factorization
bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py $(NAME)

clean:
	rm -rf $(VENV) $(DEMO)
