# `make demo` shows what the project does; `make test` checks that it does. Both set up .venv first.
.PHONY: setup demo test lint

setup:
	@scripts/setup.sh

demo: setup
	@PATH="$(CURDIR)/.venv/bin:$$PATH" scripts/demo.sh

# What is compared bit for bit, and in float32, is so on a CPU; kernels and their like have a run of their own on a GPU.
test: setup
	@CUDA_VISIBLE_DEVICES= .venv/bin/pytest
	@if nvidia-smi -L >/dev/null 2>&1; then .venv/bin/pytest -m gpu; fi

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@# mypy cannot follow an editable install's import hook, so it checks the installed package
	@rm -rf build
	@.venv/bin/pip install --quiet --no-deps --upgrade --target build/typecheck . 2>&1 | grep -v "WARNING" || true
	@MYPYPATH=build/typecheck .venv/bin/mypy -p nmm_serve
