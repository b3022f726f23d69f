"""How a command-line tool opens a checkpoint."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from megatron_mdm.environment import prepare_environment, return_freed_memory

if TYPE_CHECKING:
    from megatron_mdm.mcore.inference.loaded_model import LoadedModel


def add_checkpoint_arguments(parser: argparse.ArgumentParser, pipeline: bool = True) -> None:
    """Adds the flags that say which checkpoint to open, and where.

    Args:
        parser: of the tool.
        pipeline: whether the tool's model may be split in pipeline stages.
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


def add_hashes_argument(parser: argparse._ActionsContainer) -> None:
    """Adds the flag that skips the check of a checkpoint's files."""
    parser.add_argument(
        "--no-checkpoint-hashes",
        dest="checkpoint_hashes",
        action="store_false",
        help="do not compare the checkpoint's files with their SHA-256 hashes (integrity.json)",
    )


def open_asked_for(
    options: argparse.Namespace, edit_args: Callable[[argparse.Namespace], None] | None = None
) -> contextlib.AbstractContextManager["LoadedModel"]:
    """Opens the checkpoint that the flags of `add_checkpoint_arguments` ask for.

    Args:
        options: the tool's flags.
        edit_args: see `open_checkpoint`.
    """
    return open_checkpoint(
        options.load,
        options.device,
        getattr(options, "pipeline_model_parallel_size", 1),
        edit_args,
        options.checkpoint_hashes,
        options.trust_remote_code,
    )


@contextlib.contextmanager
def open_checkpoint(
    checkpoint: str,
    device: str,
    pipeline_parallel: int = 1,
    edit_args: Callable[[argparse.Namespace], None] | None = None,
    hashes: bool = True,
    trust: bool = False,
) -> Iterator["LoadedModel"]:
    """Loads a checkpoint as `mcore.inference.loaded_model` does, from outside Megatron.

    To be entered after the tool's own flags were parsed, before anything imports torch. Megatron's
    messages go to stderr while it loads, its loggers' for good, since they keep the stream that
    they find while they are imported: stdout stays the tool's.

    Args:
        checkpoint: directory that the run named as --save.
        device: `cuda` or `cpu`.
        pipeline_parallel: pipeline stages; the other ranks are tensor-parallel ones.
        edit_args: is called with the arguments that the checkpoint recorded, before the model is
            built, and changes them.
        hashes: compare its files with the sums that were saved with them.
        trust: run Python code that lies beside the tokenizer (--trust-remote-code).

    Raises:
        UserError: no such device or checkpoint, or a layout that the model does not allow.
    """
    sys.argv = sys.argv[:1]  # Megatron parses the command line itself, and must not see ours
    prepare_environment(device)
    if device == "cpu":
        return_freed_memory()
    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(sys.stderr):
            from megatron_mdm.mcore.device import training_device
            from megatron_mdm.mcore.inference.loaded_model import loaded_model

            stack.enter_context(training_device(device, "--device"))
            loaded = stack.enter_context(
                loaded_model(checkpoint, device, pipeline_parallel, edit_args, hashes, trust)
            )
        yield loaded
