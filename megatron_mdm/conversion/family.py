"""A model family: its form in Hugging Face files, and the flags with which Megatron builds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mdm.conversion.config import (
    Config,
    is_count,
    is_positive,
    rope_scaling_flags,
    rotary_base,
    rotary_share,
    wrong_kind,
)
from megatron_mdm.errors import UserError

# The default of a size without a default: config.json has to give it.
NEEDED = object()

# The largest --seq-length that the launch line gives. The user may raise it: a model with rotary
# positions reads rows of up to --max-position-embeddings tokens.
DEFAULT_SEQ_LENGTH = 4096

# The sizes that need not be integers.
_REAL = ("rotary_base", "rotary_percent", "norm_epsilon", "moe_router_topk_scaling_factor")

# The keys of the rotary embedding, which may stand inside another key.
_ROTARY = {"rope_theta": rotary_base, "partial_rotary_factor": rotary_share}


@dataclass(frozen=True)
class Family:
    """A model family: its form in Hugging Face files, and Megatron's arguments for it.

    Attributes:
        name: name of the family in messages.
        architecture: class name in config.json's `architectures`.
        model_type: config.json's `model_type`; several families may share it.
        sizes: Megatron argument -> (config.json key, default; a callable default reads the config).
        fixed: config.json key -> supported values. Any other value means another computation, and
            is refused.
        required: keys that config.json must have: keys of `fixed`, or `tied_key`, whose default in
            the model's class is not the supported value. Other keys of `fixed` may be absent.
        tensors: Megatron tensor -> the Hugging Face tensors that make it up; `{n}` stands for the
            layer and `{e}` for the expert.
        flags: Megatron's flags that all models of the family need.
        training_flags: further flags of the launch line, which the user may change.
        mask_token_id: the mask token if config.json does not name one; None for an autoregressive
            family.
        shifted: whether the logits of position i - 1 predict token i.
        shift_first_noisy: whether a shifted model in blocks was trained to predict the first token
            of a block from the noisy token before it (--mdm-shift-first).
        block_size_key: config.json key of the tokens in a block that the model was trained with;
            None for a family that is trained on whole rows. `mdm_block_size`, which
            `to_hugging_face` writes, for a family in blocks without a key of its own.
        block_size: the size if config.json lacks the key; None: config.json has to have it.
        in_sglang: whether SGLang serves the family, which takes the block size from a file.
        other_architectures: further class names of the family.
        experts_key: config.json key of a list with one number a layer, 1 for a layer with experts
            and 0 for a dense one; None for a family without such a list.
        dense_layers_key: config.json key of the number of dense layers, which come first; the
            others have experts. None for a family without such a number.
        transformers_class: class of Hugging Face transformers that computes the family's network
            if it is given an attention mask, since its own is causal; None: there is none.
        rope_scaling: whether the class obeys a rope scaling in config.json; False: it ignores it.
        tied_key: config.json key that says whether the output layer shares the embedding's weights.
    """

    name: str
    architecture: str
    model_type: str
    sizes: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, tuple[Any, ...]]
    tensors: Mapping[str, tuple[str, ...]]
    flags: tuple[str, ...] = ()
    training_flags: tuple[str, ...] = ()
    mask_token_id: int | None = None
    shifted: bool = False
    shift_first_noisy: bool = False
    block_size_key: str | None = None
    block_size: int | None = None
    in_sglang: bool = False
    other_architectures: tuple[str, ...] = ()
    experts_key: str | None = None
    dense_layers_key: str | None = None
    transformers_class: str | None = None
    required: tuple[str, ...] = ()
    rope_scaling: bool = True
    tied_key: str = "tie_word_embeddings"

    @property
    def in_transformers(self) -> bool:
        """Whether the architecture itself is a class of Hugging Face transformers."""
        return self.transformers_class == self.architecture

    def value(self, config: Config, argument: str) -> Any:
        """Returns the value that config.json gives for a Megatron argument of `sizes`.

        Raises:
            UserError: config.json lacks the key, or its value is not a number above 0.
        """
        key, default = self.sizes[argument]
        value = _ROTARY[key](config) if key in _ROTARY else config.get(key)
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
        """Whether the output layer shares the embedding's weights."""
        return bool(config.get(self.tied_key))

    def expert_layers(self, config: Config) -> list[bool]:
        """Returns, for each layer, whether it has experts.

        Raises:
            UserError: config.json's value is not such a list or number, or does not fit the number
                of layers.
        """
        layers = self.value(config, "num_layers")
        if self.dense_layers_key is not None:
            dense = config.get(self.dense_layers_key) or 0
            if type(dense) is not int or not 0 <= dense < layers:
                raise UserError(
                    f"config.json: {self.dense_layers_key!r} should be a number of dense layers "
                    f"from 0 to {layers - 1}, so that layers with experts follow, got {dense!r}"
                )
            return [False] * dense + [True] * (layers - dense)
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
    """Returns Megatron's flags for this model, without those of vocabulary and tokenizer.

    Raises:
        UserError: config.json asks for something that Megatron has no flag for.
    """
    flags = [
        *"--position-embedding-type rope --normalization RMSNorm --swiglu".split(),
        *"--disable-bias-linear --attention-dropout 0 --hidden-dropout 0".split(),
        *family.flags,
    ]
    share = rotary_share(config)
    if "rotary_percent" not in family.sizes and share not in (None, 1):
        raise UserError(
            f"config.json: partial_rotary_factor = {share!r} is not supported for {family.name} "
            "(supported: 1)"
        )
    values = {name: family.value(config, name) for name in family.sizes}
    if "moe_router_num_groups" in values:
        _check_groups(values)
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
    # Without the list, layers share keys; with a list, Megatron gives each layer keys of its own.
    if any(pattern) and not all(pattern):
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


def _check_groups(values: Mapping[str, Any]) -> None:
    """Checks that Megatron chooses the same groups of experts as the published classes.

    Megatron (moe_utils.group_limited_topk) ranks a group by the sum of its best
    topk // group_topk scores, and the published classes by the sum of its best two. If all groups
    are kept, the ranks choose nothing.
    """
    experts, chosen = values["num_experts"], values["moe_router_topk"]
    groups, kept = values["moe_router_num_groups"], values["moe_router_group_topk"]
    size = experts // groups
    if experts % groups or size < 2 or kept > groups or chosen > kept * size:
        raise UserError(
            f"config.json: {experts} experts (num_experts) in {groups} groups (n_group), of which "
            f"{kept} are kept (topk_group), do not give {chosen} experts a token "
            "(num_experts_per_tok) from equal groups of two or more"
        )
    if kept < groups and chosen // kept != 2:
        raise UserError(
            f"config.json: num_experts_per_tok = {chosen} with topk_group = {kept} is not "
            "supported: Megatron would rank a group of experts by the sum of its best "
            f"{chosen // kept}, and the model ranks it by its best 2 (supported: twice topk_group, "
            "or topk_group = n_group)"
        )


def mask_token_id(family: Family, config: Config) -> int | None:
    """Returns the id of a model's mask token, None for an autoregressive model."""
    declared = config.get("mask_token_id")
    return family.mask_token_id if declared is None else declared


def shifted(family: Family, config: Config) -> bool:
    """Whether, in a model with a mask token, the logits of position i - 1 predict token i.

    A model that was trained autoregressively keeps predicting the token after each position, unless
    config.json has the key `mdm_shift`, which `to_hugging_face` writes.
    """
    declared = config.get("mdm_shift")
    if declared is not None:
        return bool(declared)
    autoregressive = family.mask_token_id is None
    return family.shifted or (autoregressive and mask_token_id(family, config) is not None)


def shift_first(family: Family, config: Config, shift: bool, blocks: int | None) -> str:
    """Returns the copy that predicts the first token of a block: --mdm-shift-first.

    Args:
        family: the model family.
        config: content of config.json; `to_hugging_face` may have written the key
            `mdm_shift_first`.
        shift: whether the logits of position i - 1 predict token i.
        blocks: tokens in a block; None for whole rows.
    """
    if not shift or blocks is None:
        return "clean"
    return config.get("mdm_shift_first") or ("noisy" if family.shift_first_noisy else "clean")


def block_size(family: Family, config: Config) -> int | None:
    """Returns the tokens in a block that a model was trained with, None for whole rows.

    A family without a key of its own may have the key `mdm_block_size`, which `to_hugging_face`
    writes.

    Raises:
        UserError: config.json lacks the key, and the family has no default.
    """
    key = family.block_size_key
    if key is None:
        return config.get("mdm_block_size")
    size: int | None = config.get(key) or family.block_size
    if size is None:
        raise UserError(
            f"config.json has no {key!r}, the number of tokens in a block that the model was "
            "trained with: add it (the card or the name of the model says it, such as b32; "
            "otherwise it is 4)"
        )
    return size
