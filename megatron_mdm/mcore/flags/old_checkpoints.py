"""Settings that are newer than a checkpoint: it gets values that match its version's behaviour.

A new run gets today's default instead.
"""

from collections.abc import Mapping
from typing import Any

from megatron_mdm.config import MDMConfig, destination, flag
from megatron_mdm.mcore.flags.hybrid_pattern import model_class

_DEFAULTS = MDMConfig().arguments()
_BELLS = ("logit_normal", "beta", "bell_uniform_share", "bell_role", "bell_fade")
_BLOCKS = ("block_size", "block_size_schedule", "ar_loss_weight", "shift_first")
_LATER = ("embedding_noise", "confidence_loss")

# The behaviour of commit be7fed4, the last version without these settings. The defaults of all but
# the first have no effect.
BEFORE: dict[str, Any] = {
    "mdm_row_order": "run",
    **{name: _DEFAULTS[name] for name in map(destination, (*_BELLS, *_BLOCKS, *_LATER))},
}


def complete(saved: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Adds the settings that a checkpoint does not have.

    Args:
        saved: the arguments in the checkpoint.

    Returns:
        The arguments with the added settings, and a line that names the added settings that differ
        from today's defaults; the line is empty if there are none.
    """
    known = dict(saved)
    if "padded_vocab_size" in known:  # padding rows took part in the softmax, as in Megatron itself
        known.setdefault("mdm_vocab_size", known["padded_vocab_size"])
    if any(name.startswith("mdm_") for name in saved):
        known = {**BEFORE, **known}
    added = {name: x for name, x in known.items() if name not in saved and x != _DEFAULTS[name]}
    known.setdefault("mdm_model", model_class(known))
    line = ", ".join(f"{flag(name)} {value}" for name, value in added.items())
    return known, f"the checkpoint is older than some settings, and uses {line}" if line else ""
