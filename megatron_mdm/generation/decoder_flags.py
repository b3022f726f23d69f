"""Flags of tools that read and generate texts with a checkpoint."""

import argparse

# Names of the flags that the following three functions add, in their order.
TOKEN_FLAGS = ("special_tokens", "eos_token_ids")
DECODER_FLAGS = ("steps", "block_length", "remasking", "threshold", "edit_threshold", "edit_steps")
SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "cfg_scale")


def add_token_arguments(group: argparse._ActionsContainer) -> None:
    """Adds the flags about the tokens of texts.

    Args:
        group: parser or argument group of a tool.
    """
    group.add_argument(
        "--special-tokens",
        action=argparse.BooleanOptionalAction,
        help="encode text that spells a special token as that token, or as ordinary text (default: "
        "as in the checkpoint's data, see tools/preprocess_data.py; as that token if the data do "
        "not tell)",
    )
    group.add_argument(
        "--eos-token-ids",
        type=int,
        nargs="+",
        metavar="ID",
        help="ids of the tokens that end a text (default: the tokenizer's end of document, and the "
        "token that its chat template writes after an answer)",
    )


def add_decoder_arguments(group: argparse._ActionsContainer) -> None:
    """Adds flags for attributes of `generation.Decoder`, with the same names.

    Args:
        group: parser or argument group of a tool.
    """
    group.add_argument(
        "--steps", type=int, metavar="N", help="number of model calls (default: one per token)"
    )
    group.add_argument(
        "--block-length",
        type=int,
        metavar="N",
        help="fill blocks of N positions from left to right (default: one block)",
    )
    group.add_argument(
        "--remasking",
        choices=["low-confidence", "random"],
        default="low-confidence",
        help="predictions that a model call keeps: the most confident ones (default), or random "
        "ones",
    )
    group.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="keep all predictions with at least this probability, which saves model calls",
    )
    group.add_argument(
        "--edit-threshold",
        type=float,
        metavar="P",
        help="for models with blocks, with a --threshold: each call also replaces tokens that "
        "earlier calls wrote in its block, if the likeliest token is another one and has at least "
        "this probability (LLaDA2.1; default: no token changes)",
    )
    group.add_argument(
        "--edit-steps",
        type=int,
        metavar="N",
        help="with an --edit-threshold: most calls for a block after it is full, beyond --steps; a "
        "call that changes nothing is the last (default: 16)",
    )


def add_sampling_arguments(group: argparse._ActionsContainer) -> None:
    """Adds flags for attributes of `generation.Decoder` about sampling, with the same names.

    Args:
        group: parser or argument group of a tool.
    """
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="temperature of the sampling of tokens; 0 takes the likeliest token (default: 0)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="with a --temperature: sample from the K likeliest tokens (default: from all)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="with a --temperature: sample from the likeliest tokens whose probabilities, after "
        "temperature and --top-k, add up to P (default: 1, from all). --remasking and --threshold "
        "use the probabilities before temperature, --top-k and --top-p",
    )
    group.add_argument(
        "--cfg-scale",
        type=float,
        default=0.0,
        metavar="X",
        help="scale of classifier-free guidance: adds X times the difference from the logits with "
        "the prompt masked, which doubles the forward passes (default: 0, no guidance)",
    )
