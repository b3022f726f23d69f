"""Outputs are whole, and JSON that any program reads."""

import json
import math

import pytest

from megatron_mdm.data.outputs import complete_or_absent, write_json
from megatron_mdm.errors import UserError


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_json_cannot_say_is_not_written(value, tmp_path):
    path = tmp_path / "result.json"
    write_json(str(path), {"a": [1.5, None]})
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    with pytest.raises(UserError, match="result.json: a result is NaN or infinite"):
        write_json(str(path), {"a": [value]})
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_two_that_write_one_file_at_once_do_not_meet(tmp_path):
    """Threads, and processes of two containers, may have the same process id."""
    path = tmp_path / "index.npy"
    with complete_or_absent(str(path)) as (one,):
        with open(one, "w") as file:
            with complete_or_absent(str(path)) as (other,), open(other, "w") as theirs:
                theirs.write("other")
            file.write("one")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]
