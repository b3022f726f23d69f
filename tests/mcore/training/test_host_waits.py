"""No operation of a micro-batch makes the host wait for a GPU, except where the code says so."""

import json

from megatron_mdm.mcore.training import objective as program
from megatron_mdm.pretrain import main
from tests import ranks
from tests.mcore.training import waits


def host_waits() -> None:
    """Runs the program with a forward step that records what would wait: see waits.py."""
    program.forward_step = waits.forward_step
    main()


def test_a_forward_step_queues_without_waiting(tmp_path, data):
    flags = ["--data-path", str(data), "--data-cache-path", str(data.parent / "cache")]
    ranks.launch(tmp_path, 1, *flags, entry=host_waits)
    found = json.loads((tmp_path / "waits.json").read_text())
    assert found == {name: [] for name in waits.SETTINGS}
