#!/usr/bin/env bash
# Sets up .venv and runs all checks: ruff, mypy and every test. With --fast, the tests that start no
# processes and take no seconds each. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
tests=()
if [ "${1:-}" = --fast ]; then
    shift
    tests=(-m "not ranks and not slow")
fi
source tools/setup.sh test

ruff check .
ruff format --check .
mypy & # beside the tests: it reads torch's types anew where it has no cache
types=$!
trap 'kill $types 2>/dev/null || true' EXIT
python -m pytest "${tests[@]}" "$@" || failed=$?
trap - EXIT
wait $types
exit "${failed:-0}"
