"""Rows of the vocabulary: those that are tokens, and the padding after them.

Megatron pads the vocabulary to a multiple of --make-vocab-size-divisible-by times the
tensor-parallel size, so that the padding depends on the layout. It takes no part in the softmax
here: one checkpoint gives one loss under every layout.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.ranks import notice
from megatron_mdm.mcore.tokenizer import tokenizer_rows


def vocabulary_size(
    args: Namespace, tokenizer: Any, saved: Mapping[str, Any], source: str | None
) -> int:
    """The number of rows that are tokens.

    It is the checkpoint's: a converted model has trained rows beyond its tokenizer's. In a new run
    it is that of the tokenizer, and of the mask token if that comes after it. A new run that begins
    from a checkpoint (--finetune) may make tokens of rows of its padding, if it says so.

    Args:
        args: of this run, with the id of the mask token.
        tokenizer: Megatron's.
        saved: arguments of the checkpoint that is loaded, `mdm_vocab_size` among them (see
            old_checkpoints.py); empty if there is none.
        source: its directory.

    Raises:
        UserError: the checkpoint has another vocabulary, or the padded vocabulary no room for it.
    """
    needed = max(tokenizer_rows(tokenizer), args.mdm_mask_token_id + 1)
    size, given = saved.get("mdm_vocab_size"), args.mdm_vocab_size
    if size is not None and args.finetune and (given or 0) > size:
        notice(
            f"the checkpoint in {source} has {size} tokens: the rows of the other "
            f"{given - size} (--mdm-vocab-size {given}) have not been trained"
        )
        size = given
    if size is not None:
        if given not in (None, size):
            raise UserError(
                f"--mdm-vocab-size {given}: the checkpoint in {source} has {size} tokens; leave "
                "the flag out"
            )
        if needed > size:
            new = f", or --mdm-vocab-size {needed} for new tokens" if args.finetune else ""
            raise UserError(
                f"the tokenizer and the mask token have ids up to {needed - 1}, and the checkpoint "
                f"in {source} has a vocabulary of {size} tokens: give the tokenizer that it was "
                f"trained with{new}"
            )
        if given is None and _is_of_another_tokenizer(args, tokenizer, saved):
            raise UserError(
                f"the checkpoint in {source} has a vocabulary of {size} rows, and the tokenizer "
                f"{args.tokenizer_model or args.tokenizer_type} has {tokenizer_rows(tokenizer)}: "
                f"give the tokenizer that it was trained with, or --mdm-vocab-size {size} if it is "
                "this one"
            )
    rows: int = size or given or needed
    if rows < needed:
        raise UserError(
            f"--mdm-vocab-size {given}: the tokenizer and the mask token have ids up to "
            f"{needed - 1}"
        )
    if rows > args.padded_vocab_size:
        raise UserError(
            f"the vocabulary has {rows} tokens, and --padded-vocab-size is "
            f"{args.padded_vocab_size}: give at least as many, a multiple of the tensor-parallel "
            "size"
        )
    return rows


def _is_of_another_tokenizer(args: Namespace, tokenizer: Any, saved: Mapping[str, Any]) -> bool:
    """Whether a checkpoint without a fingerprint of its tokenizer looks like one of another.

    Its vocabulary is then not what this tokenizer's would have been padded to.
    """
    if saved.get("mdm_tokenizer") is not None:
        return False  # which is compared with this one's
    names = ("tokenizer_type", "tokenizer_model")
    if all(saved.get(name) == getattr(args, name) for name in names):
        return False
    layout = {name: saved.get(name, 1) for name in _PADDING}
    padded = vocab_size_with_padding(tokenizer.vocab_size, Namespace(**{**vars(args), **layout}))
    return bool(padded != saved["padded_vocab_size"])


_PADDING = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")
