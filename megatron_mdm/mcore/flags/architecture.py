"""Checks that the flags describe the same model as the checkpoint that is loaded.

Megatron loads the keys that the model asks for and ignores the others, and its
--use-checkpoint-args skips some of the arguments. With a forgotten flag, a run would silently train
another model than the checkpoint's.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.argument_groups import Group, flag_and_value, names, same_value
from megatron_mdm.mcore.flags.hybrid_pattern import gpt_layers, model_class

# Formats of checkpoints in which Megatron reads a GPTModel into a HybridModel.
MOVES_BETWEEN_CLASSES = ("torch_dist", "fsdp_dtensor")


def differences(saved: Mapping[str, Any], given: Mapping[str, Any], source: str) -> str:
    """Lists the arguments that describe another model; empty if there are none.

    Args:
        saved: the checkpoint's arguments.
        given: the arguments to compare with. Arguments that are missing on one side are skipped.
        source: where `given` comes from, for the text.
    """
    saved, given = ({**args, "mdm_model": model_class(args)} for args in (saved, given))
    found = []
    for name in names(Group.MODEL):
        if name in saved and name in given and not _same(name, saved, given):
            if name == "hybrid_layer_pattern":
                before, after = _layers(saved), _layers(given)
            else:
                before, after = saved[name], given[name]
            flag, was = flag_and_value(name, before)
            _, now = flag_and_value(name, after)
            found.append(f"{flag} is {was} in the checkpoint and {now} in {source}")
    return "; ".join(found)


def _same(name: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    if name == "num_query_groups":  # ungrouped attention has one group for each head
        one, other = (
            args[name] if args.get("group_query_attention") else args.get("num_attention_heads")
            for args in (saved, given)
        )
        return one == other
    if name == "group_query_attention":  # only the number of groups matters
        return True
    if name == "max_position_embeddings":  # rotary embeddings continue beyond it
        return saved[name] == given[name] or given.get("position_embedding_type") == "rope"
    if name == "mdm_model":  # a HybridModel may continue a GPTModel, not the reverse
        return saved[name] == given[name] or given[name] == "hybrid"
    classes = {model_class(saved), model_class(given)}
    if name == "hybrid_layer_pattern":
        return classes == {"gpt"} or _layers(saved) == _layers(given)
    if name in ("num_layers", "moe_layer_freq") and "hybrid" in classes:
        return True  # the pattern describes the layers
    if name == "mdm_shift":  # an unshifted model may be continued with a shift, not the reverse
        return not saved[name] or bool(given[name])
    return same_value(saved[name], given[name])


def _layers(args: Mapping[str, Any]) -> str:
    """The layers as a pattern of HybridModel without stages."""
    return (args.get("hybrid_layer_pattern") or "".join(gpt_layers(args))).replace("|", "")


def check_model(args: Namespace, saved: Mapping[str, Any], source: str | None) -> None:
    """Compares the model of the flags with that of the checkpoint that is about to be loaded.

    Args:
        args: arguments of this run.
        saved: arguments in the checkpoint; empty if there is none.
        source: directory of the checkpoint.

    Raises:
        UserError: names every flag that differs.
    """
    wrong = differences(saved, vars(args), "the flags")
    if wrong:
        raise UserError(f"the checkpoint in {source} is of another model: {wrong}")
    moves = saved and model_class(saved) != model_class(vars(args))
    if moves and saved.get("num_experts") and saved.get("moe_layer_freq", 1) != 1:
        raise UserError(
            f"the checkpoint in {source} stores each layer by itself, because of --moe-layer-freq, "
            "and Megatron cannot read such layers into a HybridModel: use --mdm-model gpt"
        )
    if moves and args.ckpt_format not in MOVES_BETWEEN_CLASSES:
        raise UserError(
            f"the checkpoint in {source} is of GPTModel, and Megatron reads --ckpt-format "
            f"{args.ckpt_format} into the same class only: use --mdm-model gpt"
        )
