#!/usr/bin/env bash
# Sets up .venv and runs all checks: ruff, mypy and every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh test

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
