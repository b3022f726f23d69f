"""A checkpoint as a model for lm-evaluation-harness."""

import contextlib
import inspect
import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_mdm.checkpoint import block_size_of, open_checkpoint
from megatron_mdm.errors import UserError
from megatron_mdm.evaluation.nelbo import DRAWS
from megatron_mdm.generation.decoder import Remasking
from megatron_mdm.lm_eval.harness import HarnessModel, Message

if TYPE_CHECKING:
    from megatron_mdm.mcore.inference.loaded_model import LoadedModel


class CheckpointModel(HarnessModel):
    """The model of `lm_eval --model mdm --model_args load=DIR,...`; see `megatron_mdm.lm_eval`.

    Args:
        load: checkpoint directory, the run's --save.
        device: `cuda` or `cpu`. A device number, as in lm_eval's default `cuda:0`, is ignored.
        batch_size: rows in a call of the model.
        max_batch_size: not used; lm_eval passes it to every model.
        pipeline_model_parallel_size: number of pipeline stages under torchrun.
        checkpoint_hashes: whether to compare the checkpoint's files with the hashes saved beside
            them.
        trust_remote_code: whether to run Python code that lies beside the tokenizer.
        block_size: see `open_checkpoint`.
        settings: see `adapter_arguments`.

    Raises:
        UserError: a value is out of range or unknown, or the checkpoint cannot be loaded.
    """

    def __init__(
        self,
        load: str | None = None,
        device: str = "cuda",
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        pipeline_model_parallel_size: int = 1,
        checkpoint_hashes: bool = True,
        trust_remote_code: bool = False,
        block_size: int | str = "trained",
        **settings: Any,
    ) -> None:
        if load is None:
            raise UserError("--model_args load=DIR is missing: the run's --save directory")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: give a number of rows")
        unknown = settings.keys() - SETTINGS
        if unknown:
            raise UserError(
                f"--model_args {sorted(unknown)[0]} is unknown: there are {', '.join(SETTINGS)}"
            )
        device = device.partition(":")[0]  # each rank uses the GPU of its local rank
        if device not in ("cuda", "cpu"):
            raise UserError(f"--device {device}: cuda or cpu")
        stack = contextlib.ExitStack()
        loaded = stack.enter_context(
            open_checkpoint(
                str(load),
                device,
                pipeline_model_parallel_size,
                None,
                checkpoint_hashes,
                trust_remote_code,
                block_size_of(str(block_size)),
            )
        )
        # lm_eval never closes a model, so this closes it at the end. It exits the context as after
        # an exception, so that ranks do not wait for a failed rank.
        weakref.finalize(self, stack.__exit__, SystemExit, SystemExit(), None)
        super().__init__(**adapter_arguments(loaded, batch_size=int(batch_size), **settings))


def adapter_arguments(
    loaded: "LoadedModel",
    batch_size: int = 16,
    draws: int = DRAWS,
    seed: int = 0,
    max_length: int | None = None,
    max_gen_toks: int = 256,
    special_tokens: bool | None = None,
    eos_token_ids: int | Sequence[int] | None = None,
    steps: int | None = None,
    block_length: int | None = None,
    remasking: Remasking = "low-confidence",
    threshold: float | None = None,
    edit_threshold: float | None = None,
    edit_steps: int | None = None,
) -> dict[str, Any]:
    """Arguments of `HarnessModel` for a checkpoint.

    Args:
        loaded: the checkpoint.
        batch_size: rows in a call of the model.
        draws: number of masks of an answer for its likelihood, a multiple of 4.
        seed: seed of masks and generated texts.
        max_length: most tokens in a row; default: the number of the model's positions.
        max_gen_toks: tokens of a generated text if the task does not set the number.
        special_tokens: whether text that spells a special token becomes that token; default: as in
            the checkpoint's data, and True if that is not known.
        eos_token_ids: tokens that end a generated text; see `decoder_of`.
        steps: default of the decoder setting, which a task may override; see `Decoder`.
        block_length: like `steps`.
        remasking: like `steps`.
        threshold: like `steps`.
        edit_threshold: like `steps`.
        edit_steps: like `steps`.

    Raises:
        UserError: a value is out of range, or the model has no mask token.
    """
    import torch

    from megatron_mdm.mcore.inference.eval_data import (
        decoder_of,
        decoding_logits,
        encoder,
        spells_special_tokens,
        template_date,
    )
    from megatron_mdm.mcore.tokenizer import chat_template

    max_length = loaded.max_length if max_length is None else max_length
    if max_length > loaded.max_length:
        raise UserError(f"max_length {max_length}: the model has {loaded.max_length} positions")
    special = spells_special_tokens(loaded.args, special_tokens)
    chat = chat_template(loaded.tokenizer, template_date(loaded.args))

    def render(messages: list[Message], add_generation_prompt: bool) -> str:
        if not special:
            raise UserError(
                "a chat template writes special tokens, but in the checkpoint's data such text is "
                "ordinary text: add --special-tokens (special_tokens=True to --model_args)"
            )
        assert chat is not None  # without a template, `render` is None
        return chat.render(messages, add_generation_prompt)

    return {
        "logits": loaded.logits,
        "encode": encoder(loaded, special),
        "mask_token_id": loaded.mask_token_id,
        "max_length": max_length,
        "draws": draws,
        "seed": seed,
        "batch_size": batch_size,
        "device": torch.cuda.current_device(),
        "shift": loaded.args.mdm_shift,
        "opening_token_id": loaded.opening_token_id,
        "decode": loaded.tokenizer.detokenize,
        "decoded": partial(decoding_logits, loaded),
        "decoder": decoder_of(
            loaded,
            eos_token_ids,
            steps=steps,
            block_length=block_length,
            remasking=remasking,
            threshold=threshold,
            edit_threshold=edit_threshold,
            edit_steps=edit_steps,
        ),
        "max_gen_toks": max_gen_toks,
        "render": render if chat else None,
        "template": lambda: chat.template if chat else "",
        "name": str(loaded.args.tokenizer_model or loaded.args.tokenizer_type).replace("/", "__"),
        "show_progress": loaded.args.rank == 0,
    }


# Names that --model_args accepts besides the arguments of CheckpointModel.
SETTINGS = tuple(inspect.signature(adapter_arguments).parameters)[2:]
