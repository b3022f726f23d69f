#!/usr/bin/env bash
# Runs the tests that depend most on Megatron against another version of megatron-core, for example
# bash tests/compat.sh 0.19.0. Everything else is that of .venv, or of the active environment with
# SETUP=no. The other version lies in a temporary folder before it. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: bash tests/compat.sh VERSION [arguments of pytest]}
shift
source tools/setup.sh test

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install -q --disable-pip-version-check --no-deps --target "$folder" \
    "megatron-core==$version"
export PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH}
python - "$version" "$folder" <<'END'
import sys

from megatron_mdm.errors import run_tool
from megatron_mdm.versions import MEGATRON, check_megatron, installed, megatron_folder, release


def main():
    warning = check_megatron()
    assert release(installed(MEGATRON.name)) == release(sys.argv[1])
    assert megatron_folder().is_relative_to(sys.argv[2])
    print(warning or f"megatron-core {sys.argv[1]}: in the tested range, {MEGATRON}", flush=True)


run_tool(main)
END

tests=(
    tests/mcore/test_private_names.py             # the names that a new version may lack
    tests/mcore/training/test_layouts.py          # layouts
    tests/mcore/checkpoint/test_resume.py         # resumes
    tests/mcore/checkpoint/test_retained.py       # asynchronous saves
    tests/mcore/checkpoint/test_old_checkpoints.py
    tests/mcore/checkpoint/test_move_to_hybrid.py # HybridModel
    tests/mcore/model/test_hybrid.py
    tests/mcore/inference/test_loaded_model.py    # inference
    tests/conversion/test_round_trip.py           # conversion
    tests/conversion/test_layouts.py
    tests/mcore/data/test_documents.py            # documents
    tests/mcore/training/test_ppots.py            # P-POTS
)
python -m pytest "$@" "${tests[@]}"
