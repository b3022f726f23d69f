"""Entries that play a rank of a launch; the words after `--` are a role as JSON, then flags."""

import json
import os
import sys
from pathlib import Path

from megatron_mdm.rehearse.rank import report
from megatron_mdm.rehearse.roles import Role
from tests.ranks import recording


def played() -> None:
    """Plays the role and writes what it has found."""
    role, *words = sys.argv[sys.argv.index("--") + 1 :]
    found = report(words, Role(**json.loads(role)))
    Path(os.environ["TRACE_DIR"], "found.json").write_text(json.dumps(found))


def recorded() -> None:
    """The same, with the record of rows that `ranks.train` keeps of a run."""
    recording.main = played
    recording.train()
