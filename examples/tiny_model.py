"""Writes a small random model with a tokenizer as a Hugging Face directory, for the examples.

    python examples/tiny_model.py --family qwen2 --output runs/tiny/qwen2

The examples use this model if they get no model directory as an argument.
"""

import argparse
import json
import pathlib
import sysconfig

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB, WIDTH, LAYERS, FFN, HEADS = 512, 64, 2, 176, 4
EOS, MASK = "<|endoftext|>", "<|mdm_mask|>"
CHAT = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
COMMON = {"vocab_size": VOCAB, "rope_theta": 10000.0, "torch_dtype": "float32"}
CONFIGS = {
    "qwen2": COMMON
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    "llada": COMMON
    | {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": WIDTH,
        "n_layers": LAYERS,
        "mlp_hidden_size": FFN,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "max_sequence_length": 128,
        "rms_norm_eps": 1e-5,
        "embedding_size": VOCAB,
        "weight_tying": False,
        "block_type": "llama",
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "rope": True,
        "include_bias": False,
        "include_qkv_bias": False,
    },
}


def tokenizer(with_mask: bool) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on Python source code."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = [EOS, MASK] if with_mask else [EOS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    inner.train([str(library / name) for name in ("argparse.py", "ast.py")], trainer)
    mask = {"mask_token": MASK} if with_mask else {}
    words = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, pad_token=EOS, **mask)
    words.chat_template = CHAT
    return words


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of all tensors."""
    if family == "llada":
        root, blocks = "model.transformer.", "model.transformer.blocks"
        names = ["attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm"]
        names += ["ff_proj", "up_proj", "ff_out"]
        ends = [f"{root}wte", f"{root}ln_f", f"{root}ff_out"]
        kv = WIDTH
    else:
        blocks = "model.layers"
        names = ["input_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo")]
        names += ["post_attention_layernorm", *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
        ends = ["model.embed_tokens", "model.norm", "lm_head"]
        kv = WIDTH // 2
    sizes = [(WIDTH,), (WIDTH, WIDTH), (kv, WIDTH), (kv, WIDTH), (WIDTH, WIDTH), (WIDTH,)]
    sizes += [(FFN, WIDTH), (FFN, WIDTH), (WIDTH, FFN)]
    found = dict(zip(ends, [(VOCAB, WIDTH), (WIDTH,), (VOCAB, WIDTH)], strict=True))
    for layer in range(LAYERS):
        for name, size in zip(names, sizes, strict=True):
            found[f"{blocks}.{layer}.{name}"] = size
            if family == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                found[f"{blocks}.{layer}.{name}.bias"] = size[:1]
    return {k if k.endswith(".bias") else f"{k}.weight": size for k, size in found.items()}


def main() -> None:
    """Writes config.json, model.safetensors and the tokenizer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=CONFIGS, required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    output = pathlib.Path(args.output)
    output.mkdir(parents=True)
    words = tokenizer(with_mask=args.family == "llada")
    words.save_pretrained(output)
    config = CONFIGS[args.family] | {"eos_token_id": words.eos_token_id}
    if args.family == "llada":
        config |= {"mask_token_id": words.mask_token_id, "pad_token_id": words.eos_token_id}
    torch.manual_seed(1)
    tensors = {
        name: torch.ones(size)
        if len(size) == 1 and "bias" not in name
        else 0.02 * torch.randn(size)
        for name, size in shapes(args.family).items()
    }
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
