"""Results are whole, and JSON that any program reads."""

import json
import math

import pytest

from megatron_mdm.data.outputs import write_json
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
