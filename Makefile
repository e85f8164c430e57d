# make quickstart   installs into .venv and runs the main job: data, training, evaluation, an answer, an export
# make test         installs into .venv and runs the tests (slow ones: make test PYTEST='-m slow')
# make ladder       installs into .venv and runs every stage of training small, in some 40 minutes; run again to go on
# make lint
# VENV= chooses another environment, PYTHON= another interpreter, ARGS= goes to `keye quickstart` and `keye ladder`.
VENV ?= .venv
INSTALL = setup.py pyproject.toml constraints/install.sh $(wildcard constraints/*.txt)

.PHONY: quickstart ladder test lint

quickstart: $(VENV)/.installed-demo
	$(VENV)/bin/keye quickstart $(ARGS)

ladder: $(VENV)/.installed-demo
	$(VENV)/bin/keye ladder $(ARGS)

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
