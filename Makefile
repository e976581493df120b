# Everything works on a fresh Debian machine; setup installs what is missing.
PYTHON := .venv/bin/python
PYTEST_ARGS ?=

.PHONY: setup fetch test screenshots demo check clean

setup:
	@vm/host-setup

# Kernels with their debug symbols and QEMU, into the cache: about 650 MB once. And the kernel with
# KGDB, from 140 MB of source: some minutes, once.
fetch: setup
	$(PYTHON) -m kgdbx.machine

test: fetch
	@mkdir -p build
	@rm -f build/junit.xml
	$(PYTHON) -m pytest -n auto --maxprocesses 4 --dist worksteal --junit-xml=build/junit.xml $(PYTEST_ARGS)
	@$(PYTHON) .ci/check_junit.py build/junit.xml

# Pictures of the shell for docs/shell.md, of a real one on a real kernel.
screenshots: fetch
	$(PYTHON) -m tests.shell.screenshots docs/images

demo: setup
	.venv/bin/kgdbx demo

check: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

# Kernels, QEMU and templates stay: they are in ~/.cache/kgdbx and /dev/shm.
clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
