#!/usr/bin/env bash
# The checks a change must pass: ruff, pyright, pytest. Arguments go to pytest: bash launch/test.sh tests/runtime -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

prepare_venv '[test]'
# Compiled programs are kept between runs; removing .cache is always safe.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/xla}
mkdir -p "$JAX_COMPILATION_CACHE_DIR"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# pyright and node come whole in their wheels; without this pyright asks the package index whether it is the newest.
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1
unset PYRIGHT_PYTHON_FORCE_VERSION PYRIGHT_PYTHON_PYLANCE_VERSION PYRIGHT_PYTHON_NODE_VERSION

.venv/bin/python -m ruff check .
.venv/bin/python -m pyright
# A file stays with one worker: what its tests share is made once.
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
