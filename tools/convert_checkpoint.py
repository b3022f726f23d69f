"""Converts checkpoints between Hugging Face and Megatron, both ways, without a GPU.

    python tools/convert_checkpoint.py --to megatron --input LLaDA-8B-Base --output llada
    python tools/convert_checkpoint.py --to megatron --input Qwen3-8B --output qwen --add-mask-token
    python tools/convert_checkpoint.py --to huggingface --input runs/llada --output LLaDA-mine

The formats are safetensors and Megatron's torch_dist. The family is detected from config.json:
Llama 2 and 3, Qwen2 and 2.5, Qwen3, LLaDA (8B and 1.5), iLLaDA, LLaDA-MoE, LLaDA2.0 and 2.1, Dream,
SDAR, Fast-dLLM v2. The tool holds one tensor in memory at a time. It refuses what it cannot convert
exactly, and a failed run leaves nothing behind.

The Megatron checkpoint loads under every tensor-, pipeline- and expert-parallel layout. It has its
arguments (--use-checkpoint-args), config.json and the tokenizer. If the model has a mask token,
launch.txt has the command that trains it. The conversion back reads checkpoints of every layout.
"""

import argparse
import contextlib
import os
import sys

from megatron_mdm.checkpoint import add_hashes_argument
from megatron_mdm.environment import prepare_environment
from megatron_mdm.errors import UserError, escaped, run_tool


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--to", required=True, choices=["megatron", "huggingface"], help="format to write"
    )
    parser.add_argument(
        "--input",
        required=True,
        metavar="DIR",
        help="model directory of Hugging Face, or the --save directory of a run",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="directory to create; it must not exist unless --replace is given",
    )
    parser.add_argument(
        "--unless-done",
        action="store_true",
        help="do nothing if --output was made from the same input with the same options; large "
        "files are compared by 4 KiB of each MiB",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="replace an --output that this tool made and that has not changed since",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the output (default: the dtype of the input)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the output again and compare every tensor bitwise; also compare the logits of "
        "both models on a few tokens in float32, if Hugging Face's class is installed and the "
        "weights take at most 4 GB",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code beside config.json: with --verify the modeling code (LLaDA, "
        "LLaDA-MoE, LLaDA2, Dream), to compare its logits; with --to megatron a tokenizer that is "
        "such code, whenever the checkpoint is trained (default: use its tokenizer.json)",
    )
    there = parser.add_argument_group("--to megatron")
    there.add_argument(
        "--add-mask-token",
        action="store_true",
        help="add a mask token to an autoregressive model: its id is the first after the "
        "tokenizer's, its embedding the mean of all; the vocabulary grows if it has no unused row",
    )
    there.add_argument(
        "--no-shift",
        action="store_true",
        help="with --add-mask-token: position i learns to predict token i, as in SDAR (default: it "
        "keeps predicting token i + 1, --mdm-shift)",
    )
    there.add_argument(
        "--pad-vocab-to-multiple-of",
        type=int,
        metavar="M",
        help="pad the vocabulary with rows of zeros to a multiple of M, so that the "
        "tensor-parallel size divides it; padding takes no part in the softmax (default: no "
        "padding)",
    )
    there.add_argument(
        "--mdm-model",
        choices=["gpt", "hybrid"],
        help="Megatron's class of the model (default: gpt); see megatron_mdm/mcore/README.md",
    )
    back = parser.add_argument_group("--to huggingface")
    back.add_argument(
        "--hf-config",
        metavar="DIR",
        help="directory with config.json and tokenizer (default: those beside the checkpoints; for "
        "a run of an earlier version, those in its --tokenizer-model directory)",
    )
    back.add_argument(
        "--iteration", type=int, metavar="N", help="checkpoint iteration (default: the latest)"
    )
    add_hashes_argument(back)
    return parser.parse_args()


def main() -> None:
    """Parses, converts, prints."""
    options = parse()
    if options.to == "megatron":
        _refuse(options, "hf_config", "iteration")
    else:
        _refuse(options, "add_mask_token", "no_shift", "pad_vocab_to_multiple_of", "mdm_model")
    multiple = options.pad_vocab_to_multiple_of
    if options.trust_remote_code and options.to == "huggingface" and not options.verify:
        raise UserError("--trust-remote-code is for --verify: add it, or leave this out")
    if options.no_shift and not options.add_mask_token:
        raise UserError("--no-shift is for --add-mask-token: add it, or leave this out")
    if multiple is not None and multiple < 1:
        raise UserError("--pad-vocab-to-multiple-of must be at least 1")
    prepare_environment("cpu")

    import torch

    from megatron_mdm.conversion.record import is_made_from, write_record
    from megatron_mdm.conversion.to_hugging_face import to_hugging_face
    from megatron_mdm.conversion.to_megatron import to_megatron
    from megatron_mdm.files import remove_abandoned, termination_raises

    dtype = getattr(torch, options.dtype) if options.dtype else None
    remove_abandoned(options.output)
    source = _source(options)
    if options.unless_done and is_made_from(options.output, source):
        print(f"{escaped(options.output)}: already made from this input and these options")
        return
    with termination_raises(), _place(options):
        if options.to == "megatron":
            to_megatron(
                options.input,
                options.output,
                add_mask=options.add_mask_token,
                keep_shift=not options.no_shift,
                multiple=multiple or 1,
                model_class=options.mdm_model or "gpt",
                dtype=dtype,
                verify=options.verify,
                trust=options.trust_remote_code,
            )
        else:
            to_hugging_face(
                options.input,
                options.output,
                config_from=options.hf_config,
                iteration=options.iteration,
                dtype=dtype,
                verify=options.verify,
                trust=options.trust_remote_code,
                hashes=options.checkpoint_hashes,
            )
        write_record(options.output, source, ["convert_checkpoint.py", *sys.argv[1:]])


def _source(options: argparse.Namespace) -> str:
    """A digest of everything that affects the output."""
    from megatron_mdm.conversion import record
    from megatron_mdm.data.record import made_from

    names = (
        *("to", "dtype", "verify", "trust_remote_code"),
        *("add_mask_token", "pad_vocab_to_multiple_of", "iteration"),
    )
    effective = {name: getattr(options, name) for name in names}
    if options.mdm_model == "hybrid":  # records are older than this option and the next
        effective["mdm_model"] = options.mdm_model
    if options.no_shift:
        effective["no_shift"] = True
    effective["output"] = os.path.abspath(options.output)  # launch.txt names it
    if options.to == "megatron":
        return made_from(record.hugging_face_sources(options.input), effective)
    sources = record.megatron_sources(options.input, options.iteration, options.hf_config)
    return made_from(sources, effective)


def _place(options: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Moves an output that is to be replaced aside until the new one is complete."""
    from megatron_mdm.conversion.record import check_replaceable
    from megatron_mdm.files import set_aside

    if not os.path.lexists(options.output):
        return contextlib.nullcontext()
    if options.replace:
        check_replaceable(options.output)
        return set_aside(options.output)
    if options.unless_done:
        raise UserError(
            f"{options.output} exists already, and no record says that it was made from this input "
            "with these options: remove it, add --replace, or give another directory"
        )
    return contextlib.nullcontext()  # the conversion itself refuses it


def _refuse(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(options, name) not in (None, False):
            raise UserError(
                f"--{name.replace('_', '-')} does not go with --to {options.to}: leave it out"
            )


if __name__ == "__main__":
    run_tool(main)
