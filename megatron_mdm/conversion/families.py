"""The model families: a table for each maps config.json and tensor names to Megatron's.

Sources: the `config.json` and the model classes that are released with the weights (Hugging Face
transformers for Llama and Qwen; `modeling_llada.py`, `modeling_lladamoe.py`, `modeling_illada.py`,
`modeling_dream.py`, `modeling_sdar.py`, `modeling_llada2_moe.py` and, for Fast-dLLM v2,
`modeling.py` for the diffusion models).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mdm.conversion.config import Config, check_kinds
from megatron_mdm.conversion.family import NEEDED, Family
from megatron_mdm.errors import UserError

# Keys that change the computation of models with the same tensors, and their neutral values.
_ELSEWHERE: Mapping[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    # Quantized or compressed weights, which have to be decoded first.
    "quantization_config": (None,),
    "compression_config": (None,),
    "transformers_weights": (None,),  # the file that transformers would read instead
}


def detect(config: Config) -> Family:
    """Finds the family of a config.json by its architecture, else by `model_type` and keys.

    Raises:
        UserError: no table describes the model; the message names the key that does not fit.
    """
    check_kinds(config)
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
    if family is None:
        raise UserError(
            f"config.json: {', '.join(architectures) or config.get('model_type')} is not a "
            f"supported architecture (supported: {', '.join(names)})"
        )
    for key in family.required:
        if config.get(key) is None:
            raise UserError(
                f"config.json has no {key!r}, for which {family.architecture} has a default of its "
                f"own: add it (supported: {_listed(family.fixed.get(key, (True, False)))})"
            )
    for key, allowed in {**_ELSEWHERE, **family.fixed}.items():
        if key in config and config[key] not in allowed:
            raise _unsupported(family, config, key, _listed(allowed))
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise _unsupported(family, config, "layer_types", "'full_attention' everywhere")
    return family


def _listed(allowed: Sequence[Any]) -> str:
    return ", ".join(map(repr, allowed))


def _unsupported(family: Family, config: Config, key: str, supported: str) -> UserError:
    return UserError(
        f"config.json: {key} = {config[key]!r} is not supported for {family.name} "
        f"(supported: {supported})"
    )


def _needed_keys(family: Family) -> list[str]:
    return [key for key, default in family.sizes.values() if default is NEEDED]


def _head_dim(config: Config) -> int:
    return int(config["hidden_size"] // config["num_attention_heads"])


_LAYER = "decoder.layers.{n}."


def _tensors(
    embedding: str, layer: str, norm: str, output: str, names: Mapping[str, str | tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Builds the table of a decoder; `names` are the tensors inside a layer."""
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
    transformers_class="LlamaForCausalLM",
    architecture="LlamaForCausalLM",
    model_type="llama",
    sizes=_SIZES,
    fixed={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    tensors=_decoder(_BLOCK),
)

QWEN2 = Family(
    name="qwen2",
    transformers_class="Qwen2ForCausalLM",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    sizes=_SIZES,
    fixed={"hidden_act": ("silu",), "use_sliding_window": (False, None)},
    tensors=_decoder(_BLOCK | _QKV_BIAS),
    flags=("--add-qkv-bias",),
)

QWEN3 = Family(
    name="qwen3",
    transformers_class="Qwen3ForCausalLM",
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

ILLADA = Family(
    name="illada",
    architecture="ILLaDAForCausalLM",
    model_type="illada",
    sizes=_SIZES
    | {
        "rotary_base": ("rope_theta", NEEDED),
        "norm_epsilon": ("rms_norm_eps", NEEDED),
    },
    # With a layer_norm_eps its class has LayerNorm in place of RMSNorm.
    fixed={**LLAMA.fixed, "layer_norm_eps": (None,)},
    required=("hidden_act", "tie_word_embeddings"),
    rope_scaling=False,
    tensors=LLAMA.tensors,
    mask_token_id=5,
    transformers_class="LlamaForCausalLM",
)

# Qwen3's network, which fills in one block of tokens after another.
SDAR = Family(
    name="sdar",
    architecture="SDARForCausalLM",
    model_type="sdar",
    sizes=QWEN3.sizes,
    fixed=QWEN3.fixed,
    tensors=QWEN3.tensors,
    flags=QWEN3.flags,
    mask_token_id=151669,
    block_size_key="block_size",  # releases have 4, 8, 16, 32 and 64
    in_sglang=True,
    transformers_class="Qwen3ForCausalLM",
)

# Fast-dLLM v2: Qwen2's network, which fills in one block of tokens after another.
FAST_DLLM = Family(
    name="fast-dllm",
    architecture="Fast_dLLM_QwenForCausalLM",
    model_type="Fast_dLLM_Qwen",
    sizes=_SIZES,
    fixed=QWEN2.fixed,
    tensors=QWEN2.tensors,
    flags=QWEN2.flags,
    mask_token_id=151665,
    shifted=True,
    shift_first_noisy=True,
    block_size_key="bd_size",
    block_size=32,
    transformers_class="Qwen2ForCausalLM",
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
        "rope_full_precision": (True,),
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
    required=("rope", "block_type", "layer_norm_type", "activation_type", "weight_tying"),
    rope_scaling=False,
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
            # The activation is applied to ff_proj, so ff_proj is the gate.
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
        # Only dense layers have this size. Without them, any value will do.
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
        # Softmax over all experts; the top-k probabilities are not renormalized.
        "moe_router_score_function": ("softmax",),
        "norm_topk_prob": (None, False),
        "moe_router_enable_expert_bias": (None, False),
        "routed_scaling_factor": (None, 1),
        "router_num_group": (None,),
        "router_topk_group": (None,),
    },
    required=("partial_rotary_factor", "qk_layernorm"),
    tensors=_decoder(_BLOCK | _QK_NORM | _EXPERTS),
    flags=("--qk-layernorm", "--moe-router-pre-softmax"),
    mask_token_id=156895,
    experts_key="moe_layer_freq",
)

_SHARED = "mlp.shared_experts."

# LLaDA2.0 and 2.1 fill in one block of tokens after another. Router: sigmoid scores, of which a
# bias for each expert and groups of experts only choose; the chosen ones' scores, normalized and
# scaled, are the weights (DeepSeek-V3's router, arXiv 2412.19437).
LLADA2 = Family(
    name="llada2",
    architecture="LLaDA2MoeModelLM",
    model_type="llada2_moe",
    sizes=_SIZES
    | {
        "num_query_groups": ("num_key_value_heads", NEEDED),
        "rotary_base": ("rope_theta", NEEDED),
        "rotary_percent": ("partial_rotary_factor", NEEDED),
        "norm_epsilon": ("rms_norm_eps", NEEDED),
        "num_experts": ("num_experts", NEEDED),
        "moe_ffn_hidden_size": ("moe_intermediate_size", NEEDED),
        # `num_shared_experts` is 1.
        "moe_shared_expert_intermediate_size": ("moe_intermediate_size", NEEDED),
        "moe_router_topk": ("num_experts_per_tok", NEEDED),
        "moe_router_num_groups": ("n_group", NEEDED),
        "moe_router_group_topk": ("topk_group", NEEDED),
        "moe_router_topk_scaling_factor": ("routed_scaling_factor", NEEDED),
    },
    fixed={
        # Training code of the authors has experts that are merged in one tensor, under the type
        # `llada2_moe_veomni`; its own script splits them.
        "model_type": ("llada2_moe",),
        "hidden_act": ("silu",),
        "use_bias": (False,),
        "use_qkv_bias": (False, None),
        "use_qk_norm": (True, None),
        "use_rmsnorm": (True, None),
        "use_sliding_window": (False, None),
        "norm_head": (False, None),
        "using_split_qkv_in_self_attention": (False, None),
        "num_shared_experts": (1,),
        "score_function": ("sigmoid", None),
        "moe_router_enable_expert_bias": (True, None),
        "router_dtype": ("fp32", None),
        "norm_topk_prob": (True, None),
    },
    required=("use_bias", "num_shared_experts"),
    tensors=_tensors(
        "model.word_embeddings.weight",
        "model.layers.{n}.",
        "model.norm.weight",
        "lm_head.weight",
        _BLOCK
        | _EXPERTS
        | {
            "self_attention.linear_qkv.weight": "attention.query_key_value.weight",
            "self_attention.q_layernorm.weight": "attention.query_layernorm.weight",
            "self_attention.k_layernorm.weight": "attention.key_layernorm.weight",
            "self_attention.linear_proj.weight": "attention.dense.weight",
            "mlp.router.expert_bias": "mlp.gate.expert_bias",
            "mlp.shared_experts.linear_fc1.weight": (
                _SHARED + "gate_proj.weight",
                _SHARED + "up_proj.weight",
            ),
            "mlp.shared_experts.linear_fc2.weight": _SHARED + "down_proj.weight",
        },
    ),
    flags=(
        "--qk-layernorm",
        *("--moe-router-score-function", "sigmoid"),
        "--moe-router-enable-expert-bias",
        *("--moe-router-dtype", "fp32"),
    ),
    # Megatron's default moves every bias by 1e-3 a step, whatever the learning rate.
    training_flags=("--moe-router-bias-update-rate", "0"),
    mask_token_id=156895,
    dense_layers_key="first_k_dense_replace",
    block_size_key="mdm_block_size",
    block_size=32,
    in_sglang=True,
)

FAMILIES = (LLAMA, QWEN2, QWEN3, LLADA, LLADA_MOE, LLADA2, ILLADA, DREAM, SDAR, FAST_DLLM)
