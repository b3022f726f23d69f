"""Values of config.json: their kinds, and every key that changes the computation."""

import itertools

import pytest

from megatron_mdm.conversion.families import FAMILIES, detect
from megatron_mdm.conversion.family import model_flags, shifted
from megatron_mdm.errors import UserError
from tests import ROOT
from tests.conversion import models

LLAMA = {**models.SMALL, "architectures": ["LlamaForCausalLM"], "rope_theta": 5000.0}
QWEN2 = {**models.SMALL, "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**models.SMALL, "architectures": ["Qwen3ForCausalLM"]}
LLAMA3 = {k: v for k, v in models.LLAMA3_SCALING.items() if k != "rope_theta"}
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 777.0}}
DEFAULT = {"rope_type": "default", "rope_theta": 777.0}
MOE = models.LLADA_MOE
MOE2 = models.LLADA2


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    "config, change, message",
    [
        # Kinds of values.
        (LLAMA, {"architectures": "LlamaForCausalLM"}, "'architectures' should be a list of texts"),
        (LLAMA, {"architectures": [1]}, "'architectures' should be a list of texts, got [1]"),
        (LLAMA, {"model_type": 3}, "'model_type' should be a text, got 3"),
        (LLAMA, {"vocab_size": 0}, "'vocab_size' should be a whole number above 0, got 0"),
        (LLAMA, {"vocab_size": "96"}, "'vocab_size' should be a whole number above 0, got '96'"),
        (LLAMA, {"mask_token_id": "<mask>"}, "'mask_token_id' should be the id of a token, got"),
        (LLAMA, {"tie_word_embeddings": "false"}, "'tie_word_embeddings' should be true or false"),
        (LLAMA, {"mdm_shift": 1}, "'mdm_shift' should be true or false, got 1"),
        (LLAMA, {"mdm_shift_first": True}, "'mdm_shift_first' should be 'clean' or 'noisy', got"),
        (LLAMA, {"rope_scaling": "yarn"}, "'rope_scaling' should be an object, got 'yarn'"),
        (LLAMA, {"rope_parameters": [1]}, "'rope_parameters' should be an object, got [1]"),
        (LLAMA, {"layer_types": "full"}, "'layer_types' should be a list of texts, got 'full'"),
        (LLAMA, {"auto_map": []}, "'auto_map' should be an object, got []"),
        # Sizes.
        (LLAMA, {"num_attention_heads": 0}, "'num_attention_heads' should be a whole number above"),
        (LLAMA, {"num_key_value_heads": 0}, "'num_key_value_heads' should be a whole number above"),
        (LLAMA, {"num_hidden_layers": True}, "'num_hidden_layers' should be a whole number above"),
        (LLAMA, {"hidden_size": 32.5}, "'hidden_size' should be a whole number above 0, got 32.5"),
        (LLAMA, {"head_dim": -8}, "'head_dim' should be a whole number above 0, got -8"),
        (LLAMA, {"rope_theta": "1e4"}, "'rope_theta' should be a number above 0, got '1e4'"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "'rms_norm_eps' should be a number above 0"),
        (models.LLADA, {"n_heads": 0, "n_kv_heads": None}, "'n_heads' should be a whole number"),
        # Rotary embeddings.
        (LLAMA, {"rope_parameters": DEFAULT}, "'rope_theta' is 5000.0 and, in 'rope_parameters'"),
        (LLAMA, {"rope_scaling": DEFAULT}, "'rope_theta' is 5000.0 and, in 'rope_parameters'"),
        (QWEN2, {"rope_parameters": NESTED}, "that differ between layers"),
        (QWEN2, {"rope_scaling": LLAMA3, "rope_parameters": DEFAULT}, "'rope_parameters' differ"),
        (LLAMA, {"rope_scaling": without(LLAMA3, "factor")}, "'factor' should be a number above 0"),
        (LLAMA, {"rope_scaling": {**LLAMA3, "factor": "8"}}, "'factor' should be a number above 0"),
        (LLAMA, {"rope_scaling": {**LLAMA3, "low_freq_factor": 2}}, "rope scaling {"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling {"),
        (LLAMA, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling {"),
        (
            LLAMA,
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096},
            "rope scaling {",
        ),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        (QWEN3, {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}, "partial_rotary_f"),
        (models.LLADA, {"rope_scaling": LLAMA3}, "rope scaling is not supported for llada"),
        # Attention, activations, biases, scales.
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = ['full_"),
        (models.DREAM, {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        (QWEN3, {"attention_bias": True}, "attention_bias = True is not supported for qwen3"),
        (LLAMA, {"attention_bias": True}, "attention_bias = True is not supported for llama"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias = True is not supported for llama"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported for llama"),
        (LLAMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        (LLAMA, {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported for llama (supported: None)"),
        (LLAMA, {"residual_multiplier": 0.2}, "residual_multiplier = 0.2 is not supported"),
        (models.LLADA, {"rope_full_precision": False}, "rope_full_precision = False is not"),
        (models.LLADA, {"layer_norm_type": "gemma_rms"}, "layer_norm_type = 'gemma_rms' is not"),
        (models.LLADA, {"multi_query_attention": True}, "multi_query_attention = True is not"),
        (models.ILLADA, {"layer_norm_eps": 1e-5}, "layer_norm_eps = 1e-05 is not supported"),
        (models.ILLADA, {"rope_theta": None}, "has no 'rope_theta', which the family illada needs"),
        (models.ILLADA, {"rope_scaling": LLAMA3}, "rope scaling is not supported for illada"),
        (MOE, {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported for llada-moe"),
        (MOE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        # LLaDA2's attention, router and experts.
        (MOE2, {"model_type": "llada2_moe_veomni"}, "model_type = 'llada2_moe_veomni' is not"),
        (MOE2, {"partial_rotary_factor": None}, "config.json has no 'partial_rotary_factor'"),
        (MOE2, {"partial_rotary_factor": "0.5"}, "'partial_rotary_factor' should be a number"),
        (
            MOE2,
            {"rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 1.0}},
            "'partial_rotary_factor' is 0.5 and, in 'rope_parameters' or 'rope_scaling', 1.0",
        ),
        (MOE2, {"use_bias": True}, "use_bias = True is not supported for llada2"),
        (MOE2, {"use_qkv_bias": True}, "use_qkv_bias = True is not supported for llada2"),
        (MOE2, {"use_qk_norm": False}, "use_qk_norm = False is not supported for llada2"),
        (MOE2, {"norm_head": True}, "norm_head = True is not supported for llada2"),
        (MOE2, {"num_shared_experts": 2}, "num_shared_experts = 2 is not supported for llada2"),
        (MOE2, {"score_function": "softmax"}, "score_function = 'softmax' is not supported"),
        (MOE2, {"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias = False"),
        (MOE2, {"norm_topk_prob": False}, "norm_topk_prob = False is not supported for llada2"),
        (MOE2, {"routed_scaling_factor": 0}, "'routed_scaling_factor' should be a number above 0"),
        (MOE2, {"n_group": None}, "config.json has no 'n_group', which the family llada2 needs"),
        (MOE2, {"n_group": 5}, "12 experts (num_experts) in 5 groups (n_group), of which 2 are"),
        (MOE2, {"n_group": 12}, "12 experts (num_experts) in 12 groups (n_group), of which 2 are"),
        (MOE2, {"topk_group": 5}, "in 4 groups (n_group), of which 5 are kept (topk_group)"),
        (MOE2, {"num_experts_per_tok": 7}, "kept (topk_group), do not give 7 experts a token"),
        (MOE2, {"num_experts_per_tok": 6}, "rank a group of experts by the sum of its best 3"),
        (MOE2, {"topk_group": 3}, "num_experts_per_tok = 4 with topk_group = 3 is not supported"),
        (MOE2, {"first_k_dense_replace": 3}, "'first_k_dense_replace' should be a number of dense"),
        (MOE2, {"first_k_dense_replace": True}, "layers from 0 to 2, so that layers with experts"),
    ],
)
def test_what_would_compute_something_else_is_refused(config, change, message):
    config = {**config, **change}
    with pytest.raises(UserError) as caught:
        model_flags(detect(config), config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_help_of_the_tool_lists_every_family():
    text = (ROOT / "tools" / "convert_checkpoint.py").read_text().split('"""')[1]
    words = text.lower().replace(",", " ").replace(".", " ").split()
    assert {family.name for family in FAMILIES} <= set(words)


@pytest.mark.parametrize(
    "config, key",
    [
        *(
            (models.LLADA, key)
            for key in "rope block_type layer_norm_type activation_type weight_tying".split()
        ),
        *((models.ILLADA, key) for key in ("hidden_act", "tie_word_embeddings")),
        (MOE, "partial_rotary_factor"),
        (MOE, "qk_layernorm"),
        (MOE2, "use_bias"),
        (MOE2, "num_shared_experts"),
    ],
)
def test_keys_whose_default_is_another_model_have_to_be_there(config, key):
    detect(config)
    for changed in (without(config, key), {**config, key: None}):
        with pytest.raises(UserError, match=f"has no '{key}', for which {config['architectures']}"):
            detect(changed)


def test_what_means_the_same_passes():
    agreeing = {**DEFAULT, "rope_theta": 5000.0}
    plain = model_flags(detect(LLAMA), LLAMA)
    for change in (
        {"rope_parameters": agreeing},
        {"rope_parameters": agreeing, "rope_theta": None},
        {"rope_scaling": None, "partial_rotary_factor": 1.0, "hidden_act": "silu"},
        {"layer_types": ["full_attention"] * 2, "mlp_bias": False, "residual_multiplier": 1.0},
    ):
        config = {**LLAMA, **change}
        assert model_flags(detect(config), config) == plain
    old = {**QWEN2, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    assert model_flags(detect(old), old)[-2:] == ["--rope-scaling-factor", "4.0"]


def test_transformers_takes_the_base_that_we_would_not_have():
    """Two bases are refused because versions of transformers differ in the one that they take."""
    import transformers

    config = transformers.LlamaConfig(**LLAMA, rope_parameters=DEFAULT)
    assert config.rope_parameters["rope_theta"] == 777.0


@pytest.mark.parametrize(
    "config, expected",
    [
        (LLAMA, False),
        ({**LLAMA, "mask_token_id": 90}, True),
        ({**LLAMA, "mask_token_id": 90, "mdm_shift": False}, False),
        (models.LLADA, False),
        ({**models.LLADA, "mdm_shift": True}, True),
        (models.DREAM, True),
        (models.ILLADA, False),
        (models.SDAR, False),
        (models.FAST_DLLM, True),
        (models.LLADA2, False),
    ],
)
def test_whether_a_model_predicts_the_token_after_a_position(config, expected):
    assert shifted(detect(config), config) is expected


def test_positions_and_the_length_of_rows_are_two_things():
    config = {**LLAMA, "max_position_embeddings": 131072}
    flags = model_flags(detect(config), config)
    values = dict(itertools.pairwise(flags))
    assert values["--max-position-embeddings"] == "131072" and values["--seq-length"] == "4096"
