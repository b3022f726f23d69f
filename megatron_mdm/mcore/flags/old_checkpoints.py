"""Settings that a checkpoint is older than: for it they have the value that its version behaved by.

A new run gets the default of today instead.
"""

from collections.abc import Mapping
from typing import Any

from megatron_mdm.config import flag

# The behaviour of be7fed4, the last version without these settings.
BEFORE: dict[str, Any] = {"mdm_row_order": "run"}


def complete(saved: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Adds the settings that a checkpoint does not know.

    Args:
        saved: the arguments in it.

    Returns:
        The arguments with these settings, and a line that names them, empty if there are none.
    """
    known = dict(saved)
    if "padded_vocab_size" in known:  # all rows took part in the softmax, Megatron's own likewise
        known.setdefault("mdm_vocab_size", known["padded_vocab_size"])
    if any(name.startswith("mdm_") for name in saved):
        known = {**BEFORE, **known}
    added = {name: value for name, value in known.items() if name not in saved}
    line = ", ".join(f"{flag(name)} {value}" for name, value in added.items())
    return known, f"the checkpoint is older than some settings, and goes by {line}" if line else ""
