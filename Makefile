# make quickstart   installs into .venv and runs the main job: data, training, evaluation, an answer, an export
# make test         installs into .venv and runs the tests (slow ones: make test PYTEST='-m slow')
# make lint
# VENV= chooses another environment, PYTHON= another interpreter, ARGS= goes to `keye quickstart`.
VENV ?= .venv
INSTALL = setup.py pyproject.toml constraints/install.sh $(wildcard constraints/*.txt)

.PHONY: quickstart test lint

quickstart: $(VENV)/.installed-demo
	$(VENV)/bin/keye quickstart $(ARGS)

# The extra `aot` (compilers for TPUs and GPUs, 460 MB) is left out: its one test is skipped without it, and .ci/run
# installs libtpu for it.
test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest $(PYTEST)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .

$(VENV)/.installed-demo: $(INSTALL)
	sh constraints/install.sh "$(VENV)" demo
	@touch $@

$(VENV)/.installed-test: $(INSTALL)
	sh constraints/install.sh "$(VENV)" test,demo
	@touch $@ $(VENV)/.installed-demo
