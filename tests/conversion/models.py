"""Tiny random models of every family, as Hugging Face directories, and the logits they compute.

Llama and Qwen come from transformers, and so do the networks of the families in blocks. LLaDA,
LLaDA-MoE, LLaDA2, iLLaDA and Dream are written here from their published architecture, as functions
of tensors with the published names, without any of our code.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, silu

from tests.conversion import llada2
from tests.conversion.llada2 import LLADA2, ROPE, VOCAB

LLADA = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 4,
    "mlp_hidden_size": 48,
    "max_sequence_length": 64,
    "rope_theta": ROPE,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "embedding_size": VOCAB,
    "mask_token_id": 90,
    "eos_token_id": 81,
    "pad_token_id": 81,
    "weight_tying": False,
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "scale_logits": False,
    "input_emb_norm": False,
    "block_group_size": 1,
    "torch_dtype": "float32",
}

DREAM = {
    "architectures": ["DreamModel"],
    "model_type": "Dream",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": ROPE,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "mask_token_id": 90,
    "eos_token_id": 81,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "torch_dtype": "float32",
}

LLADA_MOE = {
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "dense_intermediate_size": 48,
    "expert_intermediate_size": 12,
    "shared_expert_intermediate_size": None,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_layer_freq": [1, 1],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rope_theta": ROPE,
    "partial_rotary_factor": 1,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "mask_token_id": 90,
    "eos_token_id": 81,
    "pad_token_id": 81,
    "hidden_act": "silu",
    "attention_bias": False,
    "clip_qkv": None,
    "qk_layernorm": True,
    "norm_topk_prob": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "routed_scaling_factor": 1,
    "router_num_group": None,
    "router_topk_group": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

ILLADA = {
    "architectures": ["ILLaDAForCausalLM"],
    "model_type": "illada",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": ROPE,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": None,
    "vocab_size": VOCAB,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}

# Configurations of the kinds whose reference is in this file, by name.
PUBLISHED = {
    "llada": LLADA,
    "dream": DREAM,
    "illada": ILLADA,
    "llada-moe": LLADA_MOE,
    "llada-moe-dense": {**LLADA_MOE, "num_hidden_layers": 3, "moe_layer_freq": [0, 1, 1]},
    "llada2": LLADA2,
}

SDAR = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "attn_implementation": "flex_attention",
    "block_size": 4,
    "debug": False,
    "eos_token_id": 81,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "mask_token_id": 90,
    "max_position_embeddings": 64,
    "max_window_layers": 28,
    "model_type": "sdar",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": ROPE,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}

FAST_DLLM = {
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "attention_dropout": 0.0,
    "bd_size": 8,
    "eos_token_id": 81,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_types": ["full_attention"] * 2,
    "mask_token_id": 90,
    "max_position_embeddings": 64,
    "max_window_layers": 28,
    "model_type": "Fast_dLLM_Qwen",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": ROPE,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}

# Configurations of the kinds that fill in blocks, and the class of transformers of their network.
IN_BLOCKS = {
    "sdar": (SDAR, "Qwen3"),
    "fast-dllm": (FAST_DLLM, "Qwen2"),
    "llada2": (LLADA2, "Glm4Moe"),
}

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "eos_token_id": 81,
    "bos_token_id": 80,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": ROPE,
}


def make(kind: str, directory: Path, **changes) -> Path:
    """Writes the model `kind`, with these changes to its config.json."""
    torch.manual_seed(len(kind))
    directory.mkdir(parents=True)
    if kind in PUBLISHED:
        config = {**PUBLISHED[kind], **changes}
        save_file(random_tensors(config), directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config))
        return directory
    import transformers as hf

    if kind in IN_BLOCKS:
        published, name = IN_BLOCKS[kind]
        config = {**published, **changes}
        model = getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**config))
        _randomize(model)
        model.save_pretrained(directory)
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "generation_config.json").unlink(missing_ok=True)
        return directory
    config_class, model_class, own = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
        "llama-mha": (hf.LlamaConfig, hf.LlamaForCausalLM, {"num_key_value_heads": 4}),
        "llama3.1": (
            hf.LlamaConfig,
            hf.LlamaForCausalLM,
            {"rope_parameters": LLAMA3_SCALING, "head_dim": 16},
        ),
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {}),
        "qwen2-tied": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
        "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {"head_dim": 16}),
    }[kind]
    config = config_class(**{**SMALL, **own, **changes})
    model = model_class(config)
    _randomize(model)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    """Gives norms and biases random values too: initial values would hide a wrong place."""
    for name, parameter in model.named_parameters():
        scale = 0.5 if "norm" in name else 0.2
        parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name))


def write_tokenizer(directory: Path, words: dict[str, int], **special: str) -> None:
    """Writes a tokenizer of words and their ids. `<unk>` must be among the words.

    Args:
        directory: of a model.
        words: word -> id.
        special: eos_token and the like. A bos_token is put before every text.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if bos := special.get("bos_token"):
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, words[bos])]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)
    fast.save_pretrained(directory)


def random_tensors(config: dict) -> dict[str, torch.Tensor]:
    """Random tensors of a model whose reference is in this file, by their published names."""
    if config["model_type"] == "llada2_moe":
        shapes = llada2.shapes(config)
    elif "d_model" in config:
        h, f, n = config["d_model"], config["mlp_hidden_size"], config["n_layers"]
        kv = h // config["n_heads"] * config["n_kv_heads"]
        layer = {
            "attn_norm.weight": [h],
            "ff_norm.weight": [h],
            "q_proj.weight": [h, h],
            "k_proj.weight": [kv, h],
            "v_proj.weight": [kv, h],
            "attn_out.weight": [h, h],
            "ff_proj.weight": [f, h],
            "up_proj.weight": [f, h],
            "ff_out.weight": [h, f],
        }
        prefix = "model.transformer."
        shapes = {f"{prefix}blocks.{i}.{k}": s for i in range(n) for k, s in layer.items()}
        shapes |= {
            f"{prefix}wte.weight": [config["embedding_size"], h],
            f"{prefix}ln_f.weight": [h],
            f"{prefix}ff_out.weight": [config["embedding_size"], h],
        }
    else:
        h, n = config["hidden_size"], config["num_hidden_layers"]
        f = config.get("intermediate_size") or config["dense_intermediate_size"]
        kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
        layer = {
            "input_layernorm.weight": [h],
            "post_attention_layernorm.weight": [h],
            "self_attn.q_proj.weight": [h, h],
            "self_attn.k_proj.weight": [kv, h],
            "self_attn.v_proj.weight": [kv, h],
            "self_attn.o_proj.weight": [h, h],
        }
        dense = {
            "mlp.gate_proj.weight": [f, h],
            "mlp.up_proj.weight": [f, h],
            "mlp.down_proj.weight": [h, f],
        }
        experts = dict(dense)
        if "num_experts" in config:
            count, f = config["num_experts"], config["expert_intermediate_size"]
            layer |= {
                f"self_attn.{x}_norm.weight": [h // config["num_attention_heads"]] for x in "qk"
            }
            experts = {"mlp.gate.weight": [count, h]}
            for e in range(count):
                experts |= {f"mlp.experts.{e}.{x}_proj.weight": [f, h] for x in ("gate", "up")}
                experts[f"mlp.experts.{e}.down_proj.weight"] = [h, f]
        elif config["model_type"] == "Dream":
            layer |= {
                "self_attn.q_proj.bias": [h],
                "self_attn.k_proj.bias": [kv],
                "self_attn.v_proj.bias": [kv],
            }
        shapes = {}
        for i, has_experts in enumerate(config.get("moe_layer_freq", [0] * n)):
            tensors = layer | (experts if has_experts else dense)
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in tensors.items()}
        shapes |= {
            "model.embed_tokens.weight": [config["vocab_size"], h],
            "model.norm.weight": [h],
        }
        if not config["tie_word_embeddings"]:
            shapes["lm_head.weight"] = [config["vocab_size"], h]
    return {
        name: torch.randn(shape) * 0.2 + ("norm" in name or "ln_f" in name)
        for name, shape in shapes.items()
    }


def logits(directory: Path, tokens: torch.Tensor, causal: bool) -> torch.Tensor:
    """Logits of the model in a directory, fp32: tokens [b, s] -> [b, s, V]."""
    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] in ("llada", "Dream", "illada", "llada2_moe"):
        return published_logits(config, load_file(directory / "model.safetensors"), tokens)
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    mask = None
    if not causal:
        s = tokens.shape[1]
        mask = torch.zeros(tokens.shape[0], 1, s, s)  # added to the scores, hides nothing
    with torch.no_grad():
        return model(tokens, attention_mask=mask).logits


@torch.no_grad()
def block_logits(
    directory: Path, tokens: torch.Tensor, clean: torch.Tensor, size: int, shift: bool
) -> torch.Tensor:
    """Logits of masked tokens, given the clean blocks before theirs, by one pass for each block.

    Args:
        directory: of a model in `IN_BLOCKS`.
        tokens: masked tokens, int64 [b, s].
        clean: the tokens before masking, int64 [b, s].
        size: tokens in a block.
        shift: the token before predicts a token; the first token then keeps its own logits.

    Returns:
        float32 [b, s, V].
    """
    import transformers as hf

    architecture = json.loads((directory / "config.json").read_text())["architectures"]
    (name,) = (
        name for config, name in IN_BLOCKS.values() if config["architectures"] == architecture
    )
    if name == "Glm4Moe":
        model = llada2.as_glm4_moe(directory)
    else:
        model = getattr(hf, f"{name}ForCausalLM").from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
    s, parts = tokens.shape[1], []
    for start in range(0, s, size):
        end = min(start + size, s)
        row = torch.cat([clean[:, :start], tokens[:, start:end]], dim=1)
        blocks = torch.arange(end) // size
        hidden = blocks[None, :] > blocks[:, None]
        mask = torch.zeros(end, end).masked_fill(hidden, -torch.inf).expand(len(row), 1, end, end)
        logits = model(row, attention_mask=mask).logits
        if shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        parts.append(logits[:, start:])
    return torch.cat(parts, dim=1)


def published_logits(config: dict, w: dict, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a network whose reference is in this file, with bidirectional attention."""
    llada = "d_model" in config
    if config["model_type"] == "llada2_moe":
        w = llada2.renamed(config, w)
    heads = config["n_heads" if llada else "num_attention_heads"]
    groups = config["n_kv_heads" if llada else "num_key_value_heads"]
    eps = config["rms_norm_eps"]
    p = "model.transformer." if llada else "model."
    x = w[p + ("wte.weight" if llada else "embed_tokens.weight")][tokens]
    for i in range(config["n_layers" if llada else "num_hidden_layers"]):
        b = f"{p}blocks.{i}." if llada else f"{p}layers.{i}."
        a = b if llada else b + "self_attn."
        y = _norm(x, w[b + ("attn_norm.weight" if llada else "input_layernorm.weight")], eps)
        q, k, v = (
            linear(y, w[f"{a}{name}_proj.weight"], w.get(f"{a}{name}_proj.bias"))
            .unflatten(-1, (count, -1))
            .transpose(1, 2)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        if a + "q_norm.weight" in w:
            q, k = _norm(q, w[a + "q_norm.weight"], eps), _norm(k, w[a + "k_norm.weight"], eps)
        share = config.get("partial_rotary_factor", 1)
        q, k = (_rotate(x, config["rope_theta"], share) for x in (q, k))
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        y = (scores @ v).transpose(1, 2).flatten(2)
        x = x + y @ w[b + ("attn_out.weight" if llada else "self_attn.o_proj.weight")].T
        y = _norm(x, w[b + ("ff_norm.weight" if llada else "post_attention_layernorm.weight")], eps)
        if b + "mlp.gate.expert_bias" in w:
            x = x + llada2.experts(y, w, b + "mlp.", config, _mlp)
        elif b + "mlp.gate.weight" in w:
            x = x + _experts(y, w, b + "mlp.", config["num_experts_per_tok"])
        elif llada:
            x = x + _mlp(y, *(w[f"{b}{name}.weight"] for name in ("ff_proj", "up_proj", "ff_out")))
        else:
            x = x + _mlp(y, *(w[f"{b}mlp.{x}_proj.weight"] for x in ("gate", "up", "down")))
    x = _norm(x, w[p + ("ln_f.weight" if llada else "norm.weight")], eps)
    if config.get("tie_word_embeddings"):
        return x @ w["model.embed_tokens.weight"].T
    return x @ w["model.transformer.ff_out.weight" if llada else "lm_head.weight"].T


def _mlp(y: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (silu(y @ gate.T) * (y @ up.T)) @ down.T


def _experts(y: torch.Tensor, w: dict, prefix: str, chosen: int) -> torch.Tensor:
    """Weights the chosen experts by their softmax probabilities over all experts, unscaled."""
    probabilities = (y @ w[prefix + "gate.weight"].T).softmax(dim=-1)
    least = probabilities.sort(dim=-1, descending=True).values[..., chosen - 1 : chosen]
    weights = probabilities * (probabilities >= least)
    outputs = []
    for e in range(weights.shape[-1]):
        names = (f"{prefix}experts.{e}.{x}_proj.weight" for x in ("gate", "up", "down"))
        outputs.append(_mlp(y, *(w[name] for name in names)))
    return torch.einsum("bse,ebsh->bsh", weights, torch.stack(outputs))


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight


def _rotate(x: torch.Tensor, theta: float, share: float = 1) -> torch.Tensor:
    """Rotary embedding over halves: dimension i is rotated together with i + d/2.

    d counts the first `share` of the dimensions; the others stay as they are.
    """
    s, d = x.shape[-2], int(x.shape[-1] * share)
    x, rest = x[..., :d], x[..., d:]
    angle = torch.arange(s)[:, None] * theta ** (-torch.arange(0, d, 2) / d)
    first, second = x[..., : d // 2], x[..., d // 2 :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
