"""Flags of tools that read and generate texts with a checkpoint."""

import argparse

# Names of the flags that the following three functions add, in their order.
TOKEN_FLAGS = ("special_tokens", "eos_token_ids")
DECODER_FLAGS = ("steps", "block_length", "remasking", "threshold")
SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "cfg_scale")


def add_token_arguments(group: argparse._ActionsContainer) -> None:
    """Adds the flags about the tokens of texts.

    Args:
        group: parser or argument group of a tool.
    """
    group.add_argument(
        "--special-tokens",
        action=argparse.BooleanOptionalAction,
        help="whether text that spells a special token is that token, or ordinary text (default: "
        "as in the checkpoint's data, see tools/preprocess_data.py; that token where it is not "
        "known)",
    )
    group.add_argument(
        "--eos-token-ids",
        type=int,
        nargs="+",
        metavar="ID",
        help="tokens that end a text (default: the tokenizer's end of document, if it has one)",
    )


def add_decoder_arguments(group: argparse._ActionsContainer) -> None:
    """Adds flags for attributes of `generation.Decoder`, with the same names.

    Args:
        group: parser or argument group of a tool.
    """
    group.add_argument("--steps", type=int, help="model calls (default: one a token)")
    group.add_argument(
        "--block-length",
        type=int,
        metavar="N",
        help="fill N positions after N, from left to right (default: all at once)",
    )
    group.add_argument(
        "--remasking",
        choices=["low-confidence", "random"],
        default="low-confidence",
        help="what a call keeps: the most confident predictions (default), or any",
    )
    group.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="keep all predictions of at least this probability: fewer calls",
    )


def add_sampling_arguments(group: argparse._ActionsContainer) -> None:
    """Adds flags for attributes of `generation.Decoder` about sampling, with the same names.

    Args:
        group: parser or argument group of a tool.
    """
    group.add_argument("--temperature", type=float, default=0.0, help="0: likeliest (default)")
    group.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="with a --temperature: take one of the K likeliest tokens (default: of all)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="with a --temperature: take one of the likeliest tokens that have the probability P "
        "together, after temperature and --top-k (default: 1, of all). --remasking and --threshold "
        "go by the probabilities without temperature, --top-k and --top-p",
    )
    group.add_argument(
        "--cfg-scale",
        type=float,
        default=0.0,
        metavar="X",
        help="classifier-free guidance: logits go X times beyond those with the prompt masked, "
        "which takes two forward passes instead of one (default: 0, none)",
    )
