"""The model families: one declarative table each, from config.json and tensor names to Megatron's.

Sources: the `config.json` and the model classes that are released with the weights (Hugging Face
transformers for Llama and Qwen; `modeling_llada.py`, `modeling_lladamoe.py`, `modeling_dream.py`
for the diffusion models).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mdm.errors import UserError

Config = Mapping[str, Any]

# Absent from config.json, and no default: the model cannot be described without it.
NEEDED = object()

# Training starts with rows of at most this many tokens, unless the user says otherwise.
DEFAULT_SEQ_LENGTH = 4096


@dataclass(frozen=True)
class Family:
    """How a model family is written by Hugging Face, and how Megatron builds it.

    Attributes:
        name: for messages.
        architecture: class name in config.json's `architectures`.
        model_type: config.json's `model_type`; several families may share it.
        sizes: Megatron argument -> (config.json key, default; a callable default reads the config).
        fixed: config.json key -> values that this table describes; an absent key passes. Any other
            value means another computation, and is refused.
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
    tied_key: str = "tie_word_embeddings"
    tied_default: bool = False

    def value(self, config: Config, argument: str) -> Any:
        """The value that config.json gives to a Megatron argument of `sizes`.

        Raises:
            UserError: config.json has no such key, or its value is not a number.
        """
        key, default = self.sizes[argument]
        value = config.get(key)
        if value is None and key == "rope_theta":  # transformers 5 moved it
            value = (config.get("rope_parameters") or {}).get(key)
        if value is None:
            value = default(config) if callable(default) else default
        if value is NEEDED:
            raise UserError(f"config.json has no {key!r}, which the family {self.name} needs")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"config.json: {key!r} should be a number, got {value!r}")
        return value

    def tied(self, config: Config) -> bool:
        """Whether the output layer is the embedding."""
        return bool(config.get(self.tied_key, self.tied_default))

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


def detect(config: Config) -> Family:
    """The family of a config.json: by its architecture, else by `model_type` and keys.

    Raises:
        UserError: no table describes it; the message names the key that does not fit.
    """
    architectures = config.get("architectures") or []
    names = {
        name: family
        for family in FAMILIES
        for name in (family.architecture, *family.other_architectures)
    }
    family = next((names[name] for name in architectures if name in names), None)
    if family is None and not architectures:
        of_type = [family for family in FAMILIES if family.model_type == config.get("model_type")]
        fitting = (f for f in of_type if all(config.get(key) for key in _needed_keys(f)))
        family = next(fitting, of_type[0] if of_type else None)
    for name in architectures:
        if family is None and name in REFUSED:
            raise UserError(f"config.json: {name} is not converted: {REFUSED[name]}")
    if family is None:
        raise UserError(
            f"config.json: no table for the architecture "
            f"{', '.join(architectures) or config.get('model_type')} (known: {', '.join(names)})"
        )
    for key, allowed in family.fixed.items():
        if key in config and config[key] not in allowed:
            raise UserError(
                f"config.json: {key} = {config[key]!r} is not supported for {family.name} "
                f"(supported: {', '.join(map(repr, allowed))})"
            )
    return family


def _needed_keys(family: Family) -> list[str]:
    return [key for key, default in family.sizes.values() if default is NEEDED]


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
    return flags + _rope_scaling_flags(config)


def _rope_scaling_flags(config: Config) -> list[str]:
    """Llama 3.1's scaling; Megatron knows its factor alone, the rest is built in."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return []
    built_in = {
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    }
    if kind != "llama3" or any(scaling.get(key) != value for key, value in built_in.items()):
        raise UserError(
            f"config.json: rope scaling {dict(scaling)} is not supported: Megatron computes llama3 "
            f"with {built_in}, and no other"
        )
    return ["--use-rope-scaling", "--rope-scaling-factor", str(scaling["factor"])]


def mask_token_id(family: Family, config: Config) -> int | None:
    """The mask token of a model, None for an autoregressive one."""
    declared = config.get("mask_token_id")
    return family.mask_token_id if declared is None else declared


def _head_dim(config: Config) -> int:
    return int(config["hidden_size"] // config["num_attention_heads"])


_LAYER = "decoder.layers.{n}."
# Megatron's tensors that only one kind of layer has.
_OF_EXPERTS = (".mlp.router.", ".mlp.experts.")
_OF_DENSE = (".mlp.linear_fc1.weight", ".mlp.linear_fc2.weight")
# A norm that the local layers keep with the experts, and Transformer Engine's by itself.
LOCAL_NORM = "mlp.linear_fc1.layer_norm_weight"
TE_NORM = "pre_mlp_layernorm.weight"


def names_in_layer(target: str, experts: bool) -> list[str]:
    """Megatron's names of a tensor in one layer: none, one, or one a layer specification.

    Args:
        target: from a table.
        experts: whether the layer has experts or is a dense one.
    """
    if any(part in target for part in _OF_EXPERTS):
        return [target] if experts else []
    if experts and target.endswith(_OF_DENSE):
        return []
    if experts and target.endswith(LOCAL_NORM):
        return [target, target.removesuffix(LOCAL_NORM) + TE_NORM]
    return [target]


def _tensors(
    embedding: str, layer: str, norm: str, output: str, names: Mapping[str, str | tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Spells out a table of one decoder: `names` are those inside a layer."""
    tensors: dict[str, tuple[str, ...]] = {"embedding.word_embeddings.weight": (embedding,)}
    for target, sources in names.items():
        sources = (sources,) if isinstance(sources, str) else sources
        tensors[_LAYER + target] = tuple(layer + source for source in sources)
    return tensors | {
        "decoder.final_layernorm.weight": (norm,),
        "output_layer.weight": (output,),
    }


_SIZES: dict[str, tuple[str, Any]] = {
    "num_layers": ("num_hidden_layers", NEEDED),
    "hidden_size": ("hidden_size", NEEDED),
    "ffn_hidden_size": ("intermediate_size", NEEDED),
    "num_attention_heads": ("num_attention_heads", NEEDED),
    "num_query_groups": ("num_key_value_heads", lambda config: config["num_attention_heads"]),
    "kv_channels": ("head_dim", _head_dim),
    "max_position_embeddings": ("max_position_embeddings", NEEDED),
    "rotary_base": ("rope_theta", 10000),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
}

_BLOCK: dict[str, str | tuple[str, ...]] = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_QKV_BIAS: dict[str, str | tuple[str, ...]] = {
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv")
}
_QK_NORM: dict[str, str | tuple[str, ...]] = {
    f"self_attention.{x}_layernorm.weight": f"self_attn.{x}_norm.weight" for x in "qk"
}


def _decoder(names: Mapping[str, str | tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return _tensors(
        "model.embed_tokens.weight",
        "model.layers.{n}.",
        "model.norm.weight",
        "lm_head.weight",
        names,
    )


LLAMA = Family(
    name="llama",
    in_transformers=True,
    architecture="LlamaForCausalLM",
    model_type="llama",
    sizes=_SIZES,
    fixed={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    tensors=_decoder(_BLOCK),
)

QWEN2 = Family(
    name="qwen2",
    in_transformers=True,
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    sizes=_SIZES,
    fixed={"hidden_act": ("silu",), "use_sliding_window": (False,)},
    tensors=_decoder(_BLOCK | _QKV_BIAS),
    flags=("--add-qkv-bias",),
)

QWEN3 = Family(
    name="qwen3",
    in_transformers=True,
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    sizes=_SIZES | {"kv_channels": ("head_dim", 128)},
    fixed={**QWEN2.fixed, "attention_bias": (False,)},
    tensors=_decoder(_BLOCK | _QK_NORM),
    flags=("--qk-layernorm",),
)

DREAM = Family(
    name="dream",
    architecture="DreamModel",
    model_type="Dream",
    sizes=_SIZES,
    fixed=QWEN2.fixed,
    tensors=QWEN2.tensors,
    flags=QWEN2.flags,
    mask_token_id=151666,
    shifted=True,
)

LLADA = Family(
    name="llada",
    architecture="LLaDAModelLM",
    model_type="llada",
    sizes={
        "num_layers": ("n_layers", NEEDED),
        "hidden_size": ("d_model", NEEDED),
        "ffn_hidden_size": ("mlp_hidden_size", NEEDED),
        "num_attention_heads": ("n_heads", NEEDED),
        "num_query_groups": ("n_kv_heads", lambda config: config["n_heads"]),
        "kv_channels": ("head_dim", lambda config: config["d_model"] // config["n_heads"]),
        "max_position_embeddings": ("max_sequence_length", NEEDED),
        "rotary_base": ("rope_theta", NEEDED),
        "norm_epsilon": ("rms_norm_eps", 1e-5),
    },
    fixed={
        "block_type": ("llama",),
        "layer_norm_type": ("rms",),
        "activation_type": ("silu",),
        "rope": (True,),
        "alibi": (False,),
        "include_bias": (False,),
        "include_qkv_bias": (False, None),
        "bias_for_layer_norm": (False, None),
        "attention_layer_norm": (False,),
        "scale_logits": (False,),
        "input_emb_norm": (False,),
        "block_group_size": (1,),
        "multi_query_attention": (None, False),
    },
    tensors=_tensors(
        "model.transformer.wte.weight",
        "model.transformer.blocks.{n}.",
        "model.transformer.ln_f.weight",
        "model.transformer.ff_out.weight",
        {
            "self_attention.linear_qkv.layer_norm_weight": "attn_norm.weight",
            "self_attention.linear_qkv.weight": tuple(f"{x}_proj.weight" for x in "qkv"),
            "self_attention.linear_proj.weight": "attn_out.weight",
            "mlp.linear_fc1.layer_norm_weight": "ff_norm.weight",
            # ff_proj goes through the activation: it is the gate.
            "mlp.linear_fc1.weight": ("ff_proj.weight", "up_proj.weight"),
            "mlp.linear_fc2.weight": "ff_out.weight",
        },
    ),
    mask_token_id=126336,
    tied_key="weight_tying",
)

_EXPERT = "mlp.experts.{e}."
_EXPERTS: dict[str, str | tuple[str, ...]] = {
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.experts.experts.linear_fc1.weight": (
        _EXPERT + "gate_proj.weight",
        _EXPERT + "up_proj.weight",
    ),
    "mlp.experts.experts.linear_fc2.weight": _EXPERT + "down_proj.weight",
}

LLADA_MOE = Family(
    name="llada-moe",
    architecture="LLaDAMoEModelLM",
    other_architectures=("LLaDAMoEModel",),
    model_type="llada",
    sizes=_SIZES
    | {
        "num_experts": ("num_experts", NEEDED),
        "moe_router_topk": ("num_experts_per_tok", NEEDED),
        "moe_ffn_hidden_size": ("expert_intermediate_size", NEEDED),
        # Without dense layers nothing depends on it.
        "ffn_hidden_size": (
            "dense_intermediate_size",
            lambda config: config["expert_intermediate_size"],
        ),
        "norm_epsilon": ("rms_norm_eps", 1e-5),
        "rotary_base": ("rope_theta", NEEDED),
    },
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "clip_qkv": (None,),
        "qk_layernorm": (True,),
        "partial_rotary_factor": (1,),
        "shared_expert_intermediate_size": (None,),
        # Softmax over all experts, whose largest values are the weights as they are.
        "moe_router_score_function": ("softmax",),
        "norm_topk_prob": (None, False),
        "moe_router_enable_expert_bias": (None, False),
        "routed_scaling_factor": (None, 1),
        "router_num_group": (None,),
        "router_topk_group": (None,),
    },
    tensors=_decoder(_BLOCK | _QK_NORM | _EXPERTS),
    flags=("--qk-layernorm", "--moe-router-pre-softmax"),
    mask_token_id=156895,
    experts_key="moe_layer_freq",
)

FAMILIES = (LLAMA, QWEN2, QWEN3, LLADA, LLADA_MOE, DREAM)

# Models whose weights would convert, and would then compute something else.
REFUSED = {
    "LLaDA2MoeModelLM": (
        "its attention is block-causal, and it is trained to fill one block after clean ones; with "
        "the full attention and whole-row masks of this plugin it would be another model"
    ),
}
