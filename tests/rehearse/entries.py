"""Entries that play a rank; the words after `--` are a role as JSON, then flags of a launch."""

import json
import os
import sys
from pathlib import Path

from megatron_mdm.rehearse.flags import for_a_cpu
from megatron_mdm.rehearse.rank import report
from megatron_mdm.rehearse.roles import Role
from tests.ranks import recording


def played() -> None:
    """Plays the role and writes what it has found."""
    role, *given = sys.argv[sys.argv.index("--") + 1 :]
    found = report(for_a_cpu(given)[0], Role(**json.loads(role)), given)
    Path(os.environ["TRACE_DIR"], "found.json").write_text(json.dumps(found))


def recorded() -> None:
    """The same, with the record of rows that `ranks.train` keeps of a run."""
    recording.main = played
    recording.train()
