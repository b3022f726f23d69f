"""LLaDA2's network with random weights, and two references for its logits.

The first is written here from the published architecture (`modeling_llada2_moe.py`, with the keys
of `configs/model_configs/llada2_mini/config.json` in inclusionAI/dFactory). The second is
transformers' Glm4Moe, which computes the same network under other names.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

VOCAB = 96
ROPE = 5000.0

# Two of four groups of three experts are kept, and half of the channels of a head is rotated.
LLADA2 = {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "max_window_layers": 28,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 12,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "mask_token_id": 90,
    "pad_token_id": 81,
    "eos_token_id": 81,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": ROPE,
    "rotary_dim": 8,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "float32",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False,
    "vocab_size": VOCAB,
}


def shapes(config: dict) -> dict[str, list[int]]:
    """Shapes of the published tensors, by their names."""
    h, size = config["hidden_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    found = {
        "model.word_embeddings.weight": [config["vocab_size"], h],
        "model.norm.weight": [h],
        "lm_head.weight": [config["vocab_size"], h],
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        found |= {
            f"{layer}input_layernorm.weight": [h],
            f"{layer}post_attention_layernorm.weight": [h],
            f"{layer}attention.query_key_value.weight": [(heads + 2 * groups) * size, h],
            f"{layer}attention.query_layernorm.weight": [size],
            f"{layer}attention.key_layernorm.weight": [size],
            f"{layer}attention.dense.weight": [h, heads * size],
        }
        if n < config["first_k_dense_replace"]:
            found |= _mlp(f"{layer}mlp.", h, config["intermediate_size"])
            continue
        count, width = config["num_experts"], config["moe_intermediate_size"]
        found |= {
            f"{layer}mlp.gate.weight": [count, h],
            f"{layer}mlp.gate.expert_bias": [count],
            **_mlp(f"{layer}mlp.shared_experts.", h, width),
        }
        for e in range(count):
            found |= _mlp(f"{layer}mlp.experts.{e}.", h, width)
    return found


def _mlp(prefix: str, h: int, width: int) -> dict[str, list[int]]:
    names = {f"{prefix}{x}_proj.weight": [width, h] for x in ("gate", "up")}
    return names | {f"{prefix}down_proj.weight": [h, width]}


def renamed(config: dict, w: dict) -> dict[str, torch.Tensor]:
    """The tensors under Llama's names, with queries, keys and values of their own."""
    size = config["head_dim"]
    heads, groups = (config[f"num_{x}_heads"] * size for x in ("attention", "key_value"))
    names = {
        "model.word_embeddings": "model.embed_tokens",
        "attention.query_layernorm": "self_attn.q_norm",
        "attention.key_layernorm": "self_attn.k_norm",
        "attention.dense": "self_attn.o_proj",
    }
    found = {}
    for name, tensor in w.items():
        for before, after in names.items():
            name = name.replace(before, after)
        if "query_key_value" in name:
            parts = tensor.split([heads, groups, groups])
            for x, part in zip("qkv", parts, strict=True):
                found[name.replace("attention.query_key_value", f"self_attn.{x}_proj")] = part
        else:
            found[name] = tensor
    return found


def experts(y: torch.Tensor, w: dict, prefix: str, config: dict, mlp) -> torch.Tensor:
    """The chosen experts, weighted by their sigmoid scores, and the shared expert.

    Biases count in the choice alone. A token's experts come from the groups whose best two biased
    scores have the largest sum. A token after the other, as a definition in loops.
    """
    scores = (y @ w[prefix + "gate.weight"].T).sigmoid()
    biased = scores + w[prefix + "gate.expert_bias"]
    weights = torch.zeros_like(scores)
    size = config["num_experts"] // config["n_group"]
    for place in torch.cartesian_prod(*map(torch.arange, scores.shape[:-1])).tolist():
        token = biased[tuple(place)].tolist()
        groups = [range(size * g, size * (g + 1)) for g in range(config["n_group"])]
        groups.sort(key=lambda group: -sum(sorted(token[e] for e in group)[-2:]))
        kept = [e for group in groups[: config["topk_group"]] for e in group]
        kept.sort(key=lambda e: -token[e])
        for e in kept[: config["num_experts_per_tok"]]:
            weights[(*place, e)] = scores[(*place, e)]
    weights = weights / weights.sum(dim=-1, keepdim=True) * config["routed_scaling_factor"]

    def output(name: str) -> torch.Tensor:
        return mlp(y, *(w[f"{prefix}{name}.{x}_proj.weight"] for x in ("gate", "up", "down")))

    outputs = torch.stack([output(f"experts.{e}") for e in range(config["num_experts"])])
    return torch.einsum("bse,ebsh->bsh", weights, outputs) + output("shared_experts")


def as_glm4_moe(directory: Path):
    """transformers' Glm4Moe with the weights of a directory."""
    import transformers as hf

    config = json.loads((directory / "config.json").read_text())
    w = renamed(config, load_file(directory / "model.safetensors"))
    for n in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
        mlp = f"model.layers.{n}.mlp."
        w[f"{mlp}gate.e_score_correction_bias"] = w.pop(f"{mlp}gate.expert_bias")
        parts = {
            x: torch.stack(
                [w.pop(f"{mlp}experts.{e}.{x}_proj.weight") for e in range(config["num_experts"])]
            )
            for x in ("gate", "up", "down")
        }
        w[f"{mlp}experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        w[f"{mlp}experts.down_proj"] = parts["down"]
    rotary = {name: config[name] for name in ("rope_theta", "partial_rotary_factor")}
    model = hf.Glm4MoeForCausalLM(
        hf.Glm4MoeConfig(
            **{name: value for name, value in config.items() if name not in rotary},
            rope_parameters={"rope_type": "default", **rotary},
            n_shared_experts=config["num_shared_experts"],
            n_routed_experts=config["num_experts"],
            attn_implementation="eager",
            use_qk_norm=True,
        )
    )
    model.load_state_dict(w)
    return model.eval()
