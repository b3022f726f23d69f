"""Which of Megatron's arguments describe the model, and a check that a checkpoint has the same.

Megatron loads the keys that the model asks for and ignores the others, and its
--use-checkpoint-args leaves out some of the arguments below: a forgotten flag would train another
model than the checkpoint's, silently.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron_mdm.config import flag
from megatron_mdm.errors import UserError

DESCRIPTION = (
    "hybrid_layer_pattern",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "swiglu",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "use_rope_scaling",
    "rope_scaling_factor",
    "untie_embeddings_and_output_weights",
    "num_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_shared_expert_intermediate_size",
    "mdm_shift",
    "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
)

# Megatron's flags that are not named like their argument.
FLAGS = {"layernorm_epsilon": "--norm-epsilon", "add_bias_linear": "--disable-bias-linear"}


def differences(saved: Mapping[str, Any], given: Mapping[str, Any], source: str) -> str:
    """Says which arguments describe another model, empty if none.

    Args:
        saved: the checkpoint's arguments.
        given: the others; an argument that either lacks is not compared.
        source: what the others come from.
    """
    return "; ".join(
        f"{FLAGS.get(name, flag(name))} is {_shown(name, saved)} in the checkpoint and "
        f"{_shown(name, given)} in {source}"
        for name in DESCRIPTION
        if name in saved and name in given and not _same(name, saved, given)
    )


def _shown(name: str, args: Mapping[str, Any]) -> Any:
    """The value as the flag gives it."""
    return not args[name] if name == "add_bias_linear" else args[name]


def _same(name: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    if name == "num_query_groups":  # ungrouped attention has one group a head
        one, other = (
            args[name] if args.get("group_query_attention") else args.get("num_attention_heads")
            for args in (saved, given)
        )
        return one == other
    if name == "hybrid_layer_pattern":  # a pattern may continue a model without, not the reverse
        return bool(given[name] or not saved[name]) and _layers(saved) == _layers(given)
    if name == "num_layers" and given.get("hybrid_layer_pattern"):  # follows from the pattern
        return True
    if name == "mdm_shift":  # an unshifted model may be continued with a shift, not the reverse
        return not saved[name] or bool(given[name])
    return saved[name] == given[name] or (not saved[name] and not given[name])


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
