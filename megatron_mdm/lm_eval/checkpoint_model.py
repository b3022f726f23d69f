"""A checkpoint as a model of lm-evaluation-harness."""

import contextlib
import inspect
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_mdm.checkpoint import open_checkpoint
from megatron_mdm.errors import UserError
from megatron_mdm.evaluation.nelbo import DRAWS
from megatron_mdm.generation.decoder import Remasking
from megatron_mdm.lm_eval.harness import HarnessModel, Message

if TYPE_CHECKING:
    from megatron_mdm.mcore.inference.loaded_model import LoadedModel


class CheckpointModel(HarnessModel):
    """What `lm_eval --model mdm --model_args load=DIR,...` makes, see `megatron_mdm.lm_eval`.

    Args:
        load: checkpoint directory, the run's --save.
        device: `cuda`, perhaps with a number as lm_eval has it by default, or `cpu`.
        batch_size: rows in a call of the model.
        max_batch_size: of no effect; lm_eval gives it to every model.
        pipeline_model_parallel_size: stages under torchrun.
        checkpoint_hashes: compare its files with the sums that were saved with them.
        trust_remote_code: run Python code that lies beside the tokenizer.
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
        device = device.partition(":")[0]  # ranks take the GPU of their number
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
            )
        )
        # lm_eval closes no model. As after an exception: ranks do not wait for one that has failed.
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
) -> dict[str, Any]:
    """Arguments of `HarnessModel` for a checkpoint.

    Args:
        loaded: the checkpoint.
        batch_size: rows in a call of the model.
        draws: masks of an answer for its likelihood, a multiple of 4.
        seed: of masks and generated texts.
        max_length: most tokens in a row; default: the model's positions.
        max_gen_toks: tokens of a generated text where the task does not say.
        special_tokens: whether text that spells a special token is that token; default: as in the
            checkpoint's data, and that token where it is not known.
        eos_token_ids: tokens that end a generated text; default: the end of document.
        steps: see `Decoder`, the defaults of what tasks may set, as below.
        block_length: see `Decoder`.
        remasking: see `Decoder`.
        threshold: see `Decoder`.

    Raises:
        UserError: a value is out of range, or the model has no mask token.
    """
    import torch

    from megatron_mdm.mcore.inference.eval_data import decoder_of, encoder, spells_special_tokens
    from megatron_mdm.mcore.tokenizer import chat_template

    max_length = loaded.max_length if max_length is None else max_length
    if max_length > loaded.max_length:
        raise UserError(f"max_length {max_length}: the model has {loaded.max_length} positions")
    special = spells_special_tokens(loaded.args, special_tokens)
    chat = chat_template(loaded.tokenizer)

    def render(messages: list[Message], add_generation_prompt: bool) -> str:
        if not special:
            raise UserError(
                "a chat template writes special tokens, which the texts of the checkpoint's data "
                "do not spell: add --special-tokens (special_tokens=True to --model_args)"
            )
        assert chat is not None  # else nobody calls this
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
        "decoder": decoder_of(
            loaded,
            eos_token_ids,
            steps=steps,
            block_length=block_length,
            remasking=remasking,
            threshold=threshold,
        ),
        "max_gen_toks": max_gen_toks,
        "render": render if chat else None,
        "template": lambda: chat.template if chat else "",
        "name": str(loaded.args.tokenizer_model or loaded.args.tokenizer_type).replace("/", "__"),
        "show_progress": loaded.args.rank == 0,
    }


# What --model_args may say beside the arguments of CheckpointModel.
SETTINGS = tuple(inspect.signature(adapter_arguments).parameters)[2:]
