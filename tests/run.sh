#!/usr/bin/env bash
# Sets up .venv and runs all checks: ruff, mypy and every test. With --fast, it runs only tests that
# start no processes and are not slow. Further arguments go to pytest.
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
mypy & # runs beside the tests, because without a cache it reads torch's types again
types=$!
trap 'kill $types 2>/dev/null || true' EXIT
# With pytest-xdist, two workers take whole files. A later -n changes the number of workers.
if python -c 'import xdist' 2>/dev/null; then
    tests+=(-n 2 --dist loadfile)
fi
status=0
python -m pytest "${tests[@]}" "$@" || status=$?
trap - EXIT
wait $types
exit $status
