#!/usr/bin/env bash
# Sets up .venv and runs all checks: ruff, mypy and every test, or with --fast those tests that start
# no processes and take no seconds each. Further arguments go to pytest.
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
mypy & # beside the tests: without a cache it reads torch's types anew
types=$!
trap 'kill $types 2>/dev/null || true' EXIT
# Two workers, each with files of its own, where pytest-xdist is; -n after these replaces the number.
if python -c 'import xdist' 2>/dev/null; then
    tests+=(-n 2 --dist loadfile)
fi
status=0
python -m pytest "${tests[@]}" "$@" || status=$?
trap - EXIT
wait $types
exit $status
