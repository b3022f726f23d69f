"""The process before torch and Megatron are imported."""

import re
from pathlib import Path

import megatron_mdm


def test_no_module_imports_a_program():
    """Which runs as __main__: each rank would hold a second copy of it."""
    package = Path(megatron_mdm.__file__).parent
    programs = re.compile(
        r"^\s*(from|import) megatron_mdm\.(pretrain|launch|lm_eval\.__main__)\b", re.M
    )
    assert [str(path) for path in package.rglob("*.py") if programs.search(path.read_text())] == []
