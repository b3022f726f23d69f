"""Settings that a checkpoint is older than: for it they have the value that its version behaved by.

A new run gets the default of today instead.
"""

from collections.abc import Mapping
from typing import Any

from megatron_mdm.config import MDMConfig, destination, flag

_DEFAULTS = MDMConfig().arguments()
_BELLS = ("logit_normal", "beta", "bell_uniform_share", "bell_role", "bell_fade")

# The behaviour of be7fed4, the last version without these settings; bells do nothing by default.
BEFORE: dict[str, Any] = {
    "mdm_row_order": "run",
    **{name: _DEFAULTS[name] for name in map(destination, _BELLS)},
}


def complete(saved: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Adds the settings that a checkpoint does not know.

    Args:
        saved: the arguments in it.

    Returns:
        The arguments with these settings, and a line that names those that are not the default of
        today, empty if there are none.
    """
    known = dict(saved)
    if "padded_vocab_size" in known:  # all rows took part in the softmax, Megatron's own likewise
        known.setdefault("mdm_vocab_size", known["padded_vocab_size"])
    if any(name.startswith("mdm_") for name in saved):
        known = {**BEFORE, **known}
    added = {name: x for name, x in known.items() if name not in saved and x != _DEFAULTS[name]}
    line = ", ".join(f"{flag(name)} {value}" for name, value in added.items())
    return known, f"the checkpoint is older than some settings, and goes by {line}" if line else ""
