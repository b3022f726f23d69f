"""How a command-line tool opens a checkpoint."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from megatron_mdm.environment import prepare_environment, return_freed_memory
from megatron_mdm.errors import UserError

if TYPE_CHECKING:
    from megatron_mdm.mcore.inference.loaded_model import LoadedModel


def add_checkpoint_arguments(parser: argparse.ArgumentParser, pipeline: bool = True) -> None:
    """Adds the flags that say which checkpoint to open, and where.

    Args:
        parser: the tool's parser.
        pipeline: whether the tool supports pipeline parallelism.
    """
    parser.add_argument("--load", required=True, help="checkpoint directory (the run's --save)")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="device to compute on (default: %(default)s)",
    )
    add_hashes_argument(parser)
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code beside the checkpoint's tokenizer; without this flag it never runs, "
        "whatever the checkpoint says",
    )
    if pipeline:
        parser.add_argument(
            "--pipeline-model-parallel-size",
            type=int,
            default=1,
            metavar="N",
            help="number of pipeline stages under torchrun; the ranks of a stage are "
            "tensor-parallel (default: 1)",
        )


def add_block_size_argument(parser: argparse._ActionsContainer) -> None:
    """Adds --block-size, which `open_checkpoint` takes."""
    parser.add_argument(
        "--block-size",
        type=block_size_of,
        default="trained",
        metavar="SIZE",
        help="tokens in a block, `row` for whole rows, or `trained` for the size that the "
        "checkpoint was last trained with (default: %(default)s)",
    )


def block_size_of(text: str) -> str:
    """A value of --block-size, checked.

    Raises:
        UserError: it is no size.
    """
    if text not in ("trained", "row") and not (text.isdecimal() and int(text)):
        raise UserError(f"--block-size takes a number of tokens, `row` or `trained`, got {text}")
    return text


def add_hashes_argument(parser: argparse._ActionsContainer) -> None:
    """Adds the flag that skips the check of a checkpoint's files."""
    parser.add_argument(
        "--no-checkpoint-hashes",
        dest="checkpoint_hashes",
        action="store_false",
        help="do not compare the checkpoint's files with their SHA-256 hashes (integrity.json)",
    )


def open_asked_for(
    options: argparse.Namespace,
    edit_args: Callable[[argparse.Namespace], None] | None = None,
    block_size: str | None = None,
) -> contextlib.AbstractContextManager["LoadedModel"]:
    """Opens the checkpoint that the flags of `add_checkpoint_arguments` ask for.

    Args:
        options: the tool's flags.
        edit_args: see `open_checkpoint`.
        block_size: see `open_checkpoint`.
    """
    return open_checkpoint(
        options.load,
        options.device,
        getattr(options, "pipeline_model_parallel_size", 1),
        edit_args,
        options.checkpoint_hashes,
        options.trust_remote_code,
        block_size,
    )


@contextlib.contextmanager
def open_checkpoint(
    checkpoint: str,
    device: str,
    pipeline_parallel: int = 1,
    edit_args: Callable[[argparse.Namespace], None] | None = None,
    hashes: bool = True,
    trust: bool = False,
    block_size: str | None = None,
) -> Iterator["LoadedModel"]:
    """Loads a checkpoint as `mcore.inference.loaded_model` does, in a process without Megatron.

    Enter this context after the tool has parsed its own flags and before anything imports torch.
    Only the tool writes to stdout. Megatron's messages go to stderr while the checkpoint is loaded.
    Megatron's loggers write to stderr afterwards too, because they keep the stream that they find
    when they are imported.

    Args:
        checkpoint: directory that was the run's --save.
        device: `cuda` or `cpu`.
        pipeline_parallel: number of pipeline stages; the ranks of a stage are tensor-parallel.
        edit_args: function that changes the arguments that the checkpoint recorded; it is called
            before the model is built.
        hashes: whether to compare the checkpoint's files with the hashes saved beside them.
        trust: whether to run Python code that lies beside the tokenizer (--trust-remote-code).
        block_size: tokens in a block, `row` for whole rows, or `trained` for the size that the
            checkpoint was last trained with. None: the caller reads whole rows, and a checkpoint
            that was last trained in blocks is refused.

    Raises:
        UserError: the device or the checkpoint does not exist, or the model does not allow this
            layout.
    """
    sys.argv = sys.argv[:1]  # Megatron parses the command line itself and must not see our flags
    prepare_environment(device)
    if device == "cpu":
        return_freed_memory()
    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(sys.stderr):
            from megatron_mdm.mcore.device import training_device
            from megatron_mdm.mcore.inference.loaded_model import loaded_model

            stack.enter_context(training_device(device, "--device"))
            loaded = stack.enter_context(
                loaded_model(
                    checkpoint, device, pipeline_parallel, edit_args, hashes, trust, block_size
                )
            )
        yield loaded
