"""The autoregressive program says what it cannot do; tests/test_guides.py trains with it."""

from types import SimpleNamespace

import pytest

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.experiments.autoregressive import next_tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "^--mdm-shift is missing"),
        ({"shift": True, "isolate_documents": True}, "^--mdm-isolate-documents: this program"),
        ({"shift": True, "block_size": 4}, "^--mdm-block-size and --mdm-block-size-schedule: this"),
        ({"shift": True, "block_size_schedule": "0:4 9:row"}, "not blocks; leave them out$"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    objective = SimpleNamespace(state=SimpleNamespace(mdm=MDMConfig(**settings)))
    with pytest.raises(UserError, match=message):
        next_tokens(objective)
