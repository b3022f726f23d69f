"""A model family: how Hugging Face writes it, and the flags with which Megatron builds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mdm.conversion.config import (
    Config,
    is_count,
    is_positive,
    rope_scaling_flags,
    rotary_base,
    wrong_kind,
)
from megatron_mdm.errors import UserError

# Absent from config.json, and no default: the model cannot be described without it.
NEEDED = object()

# Training starts with rows of at most this many tokens, unless the user says otherwise. A model
# with rotary positions reads longer ones too, up to its --max-position-embeddings.
DEFAULT_SEQ_LENGTH = 4096

# The sizes that need not be whole.
_REAL = ("rotary_base", "norm_epsilon")


@dataclass(frozen=True)
class Family:
    """How a model family is written by Hugging Face, and how Megatron builds it.

    Attributes:
        name: for messages.
        architecture: class name in config.json's `architectures`.
        model_type: config.json's `model_type`; several families may share it.
        sizes: Megatron argument -> (config.json key, default; a callable default reads the config).
        fixed: config.json key -> values that this table describes. Any other value means another
            computation, and is refused.
        required: keys of `fixed`, or `tied_key`, without which the model's class computes something
            else; another absent key passes.
        tensors: Megatron's tensor -> the Hugging Face tensors that make it up, `{n}` the layer and
            `{e}` the expert.
        flags: Megatron's switches that all models of the family need.
        mask_token_id: mask token where config.json does not name it; None for an autoregressive
            family.
        shifted: the logits of position i - 1 predict token i.
        other_architectures: further names of the same class.
        experts_key: config.json's list of 1 (a layer of experts) and 0 (a dense one), one a layer;
            None for a family without experts.
        in_transformers: its class is part of Hugging Face transformers, with causal attention.
        rope_scaling: its class scales rotary embeddings where config.json says so, and does not
            ignore it.
    """

    name: str
    architecture: str
    model_type: str
    sizes: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, tuple[Any, ...]]
    tensors: Mapping[str, tuple[str, ...]]
    flags: tuple[str, ...] = ()
    mask_token_id: int | None = None
    shifted: bool = False
    other_architectures: tuple[str, ...] = ()
    experts_key: str | None = None
    in_transformers: bool = False
    required: tuple[str, ...] = ()
    rope_scaling: bool = True
    tied_key: str = "tie_word_embeddings"

    def value(self, config: Config, argument: str) -> Any:
        """The value that config.json gives to a Megatron argument of `sizes`.

        Raises:
            UserError: config.json has no such key, or its value is no number, or none above 0.
        """
        key, default = self.sizes[argument]
        value = rotary_base(config) if key == "rope_theta" else config.get(key)
        if value is None:
            value = default(config) if callable(default) else default
        if value is NEEDED:
            raise UserError(f"config.json has no {key!r}, which the family {self.name} needs")
        if argument in _REAL:
            if not is_positive(value):
                raise wrong_kind(key, "a number above 0", value)
        elif not is_count(value):
            raise wrong_kind(key, "a whole number above 0", value)
        return value

    def tied(self, config: Config) -> bool:
        """Whether the output layer is the embedding."""
        return bool(config.get(self.tied_key))

    def expert_layers(self, config: Config) -> list[bool]:
        """Which layers have experts.

        Raises:
            UserError: config.json's list is none, or of another length.
        """
        layers = self.value(config, "num_layers")
        if self.experts_key is None:
            return [False] * layers
        pattern = config.get(self.experts_key) or [1] * layers
        zeros_and_ones = isinstance(pattern, list) and all(x in (0, 1) for x in pattern)
        if not zeros_and_ones or len(pattern) != layers:
            raise UserError(
                f"config.json: {self.experts_key!r} should be a list of 0 or 1 for each of the "
                f"{layers} layers, got {pattern!r}"
            )
        return [bool(experts) for experts in pattern]


def model_flags(family: Family, config: Config) -> list[str]:
    """Megatron's flags that build this model, vocabulary and tokenizer left out.

    Raises:
        UserError: config.json says something that Megatron has no flag for.
    """
    flags = [
        *"--position-embedding-type rope --normalization RMSNorm --swiglu".split(),
        *"--disable-bias-linear --attention-dropout 0 --hidden-dropout 0".split(),
        *family.flags,
    ]
    values = {name: family.value(config, name) for name in family.sizes}
    if values["rotary_base"] != int(values["rotary_base"]):
        raise UserError(f"config.json: rope_theta {values['rotary_base']} is not a whole number")
    values["rotary_base"] = int(values["rotary_base"])
    if values["num_attention_heads"] % values["num_query_groups"]:
        raise UserError(
            f"config.json: {values['num_attention_heads']} attention heads cannot share "
            f"{values['num_query_groups']} key-value heads"
        )
    for name, value in values.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    flags += ["--group-query-attention"]
    pattern = family.expert_layers(config)
    if any(pattern) and not all(pattern):  # all alike is Megatron's default, with other keys
        flags += ["--moe-layer-freq", "[" + ",".join(str(int(x)) for x in pattern) + "]"]
    flags += ["--seq-length", str(min(values["max_position_embeddings"], DEFAULT_SEQ_LENGTH))]
    if not family.tied(config):
        flags += ["--untie-embeddings-and-output-weights"]
    scaling = rope_scaling_flags(config)
    if scaling and not family.rope_scaling:
        raise UserError(
            f"config.json: rope scaling is not supported for {family.name}: {family.architecture} "
            "ignores it"
        )
    return flags + scaling


def mask_token_id(family: Family, config: Config) -> int | None:
    """The mask token of a model, None for an autoregressive one."""
    declared = config.get("mask_token_id")
    return family.mask_token_id if declared is None else declared


def shifted(family: Family, config: Config) -> bool:
    """Whether the logits of position i - 1 predict token i in a model with a mask token.

    What was trained autoregressively goes on predicting the token after each position, unless
    config.json, as `to_hugging_face` writes it, says otherwise.
    """
    declared = config.get("mdm_shift")
    if declared is not None:
        return bool(declared)
    autoregressive = family.mask_token_id is None
    return family.shifted or (autoregressive and mask_token_id(family, config) is not None)
