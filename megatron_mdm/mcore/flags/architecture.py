"""A check that the flags describe the model of the checkpoint that is loaded.

Megatron loads the keys that the model asks for and ignores the others, and its
--use-checkpoint-args leaves out some of the arguments: a forgotten flag would train another model
than the checkpoint's, silently.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.argument_groups import Group, flag_and_value, names, same_value


def differences(saved: Mapping[str, Any], given: Mapping[str, Any], source: str) -> str:
    """Says which arguments describe another model, empty if none.

    Args:
        saved: the checkpoint's arguments.
        given: the others; an argument that either lacks is not compared.
        source: what the others come from.
    """
    found = []
    for name in names(Group.MODEL):
        if name in saved and name in given and not _same(name, saved, given):
            flag, was = flag_and_value(name, saved[name])
            _, now = flag_and_value(name, given[name])
            found.append(f"{flag} is {was} in the checkpoint and {now} in {source}")
    return "; ".join(found)


def _same(name: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    if name == "num_query_groups":  # ungrouped attention has one group a head
        one, other = (
            args[name] if args.get("group_query_attention") else args.get("num_attention_heads")
            for args in (saved, given)
        )
        return one == other
    if name == "group_query_attention":  # what counts is the number of groups
        return True
    if name == "max_position_embeddings":  # rotary embeddings go on beyond it
        return saved[name] == given[name] or given.get("position_embedding_type") == "rope"
    if name == "hybrid_layer_pattern":  # a pattern may continue a model without, not the reverse
        return bool(given[name] or not saved[name]) and _layers(saved) == _layers(given)
    if name == "num_layers" and given.get("hybrid_layer_pattern"):  # follows from the pattern
        return True
    if name == "mdm_shift":  # an unshifted model may be continued with a shift, not the reverse
        return not saved[name] or bool(given[name])
    return same_value(saved[name], given[name])


def _layers(args: Mapping[str, Any]) -> str | None:
    """The layers as a pattern of HybridModel's without its stages; None if no pattern says it."""
    if args.get("hybrid_layer_pattern"):
        return str(args["hybrid_layer_pattern"]).replace("|", "")
    if not args.get("num_experts"):
        return "*-" * args["num_layers"]
    return "*E" * args["num_layers"] if args.get("moe_layer_freq", 1) == 1 else None


def check_model(args: Namespace, saved: Mapping[str, Any], source: str | None) -> None:
    """Compares the model of the flags with that of the checkpoint that is about to be loaded.

    Args:
        args: of this run.
        saved: of the checkpoint; empty if there is none.
        source: its directory.

    Raises:
        UserError: names every flag that differs.
    """
    wrong = differences(saved, vars(args), "the flags")
    if wrong:
        raise UserError(f"the checkpoint in {source} is of another model: {wrong}")
