"""The number of vocabulary rows that are tokens; the rows after them are padding.

Megatron pads the vocabulary to a multiple of --make-vocab-size-divisible-by times the
tensor-parallel size, so the padding depends on the layout. Here padding rows take no part in the
softmax, so a checkpoint gives the same loss under every layout.
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

    With a checkpoint it is the checkpoint's number: a converted model has trained rows beyond its
    tokenizer's. In a new run it follows from the tokenizer and from the mask token, whose id may be
    larger. With --finetune, --mdm-vocab-size may turn padding rows of the checkpoint into tokens.

    Args:
        args: arguments of this run, with the id of the mask token.
        tokenizer: Megatron's tokenizer.
        saved: arguments of the checkpoint that is loaded, `mdm_vocab_size` among them (see
            old_checkpoints.py); empty if there is none.
        source: directory of the checkpoint.

    Raises:
        UserError: the checkpoint has another vocabulary, or the padded vocabulary is too small.
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
    """Whether a checkpoint without a tokenizer fingerprint seems to be of another tokenizer.

    The check is that this tokenizer's vocabulary would be padded to another size.
    """
    if saved.get("mdm_tokenizer") is not None:
        return False  # `check_tokenizer` compares the fingerprints
    names = ("tokenizer_type", "tokenizer_model")
    if all(saved.get(name) == getattr(args, name) for name in names):
        return False
    layout = {name: saved.get(name, 1) for name in _PADDING}
    padded = vocab_size_with_padding(tokenizer.vocab_size, Namespace(**{**vars(args), **layout}))
    return bool(padded != saved["padded_vocab_size"])


_PADDING = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")
