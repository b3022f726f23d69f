"""Measures the variance of a batch's gradient under each method, at one fine-tuning checkpoint.

    python examples/reproduce/noise.py --load CHECKPOINT --methods JSON --json noise.json

The program draws batches as training does, from the checkpoint's own data with other random
numbers, and computes the trace of the covariance of their gradients, in the units of each method's
own loss. JSON maps the name of a method to an object with the settings of its objective and the
rows of its batch. P-POTS uses a density that is fitted at this checkpoint.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_mdm.checkpoint import add_checkpoint_arguments, open_asked_for
from megatron_mdm.errors import UserError, run_tool
from megatron_mdm.files import write_json

if TYPE_CHECKING:
    from megatron_mdm.mcore.training.micro_batch import MicroBatch

SKETCH = 65_536  # dimension that gradients are projected to: traces within half a percent
RATE_ROWS = 100  # rows that P-POTS is fitted on, each once in each bin of t


def main() -> None:
    """Measures every method and writes the variances."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_arguments(parser, pipeline=False)
    parser.add_argument("--methods", required=True, metavar="JSON", help="what to measure")
    parser.add_argument("--batches", type=int, default=100, metavar="N", help="(default: 100)")
    parser.add_argument("--json", required=True, metavar="FILE", help="file to write")
    options = parser.parse_args()
    try:
        methods = {name: dict(settings) for name, settings in json.loads(options.methods).items()}
        batches = {name: int(settings.pop("batch")) for name, settings in methods.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError('--methods: not of the form {"NAME": {"batch": 32, ...}}') from error
    if options.batches < 2:
        raise UserError(f"--batches {options.batches}: must be at least 2")
    # Megatron prints the paths of its data to stdout.
    with open_asked_for(options) as loaded, contextlib.redirect_stdout(sys.stderr):
        variances = {
            name: variance(
                loaded, training_batches(loaded, settings, batches[name], options.batches)
            )
            for name, settings in methods.items()
        }
    write_json(options.json, {"noise": variances})
    for name, value in variances.items():
        print(f"{name:42s} {value:10.4g}")


def variance(loaded: Any, batches: Iterator["MicroBatch"]) -> float:
    """Computes an unbiased estimate of the trace of the covariance of batch gradients.

    Args:
        loaded: the loaded checkpoint.
        batches: at least two batches from `training_batches`.
    """
    import torch

    from megatron_mdm.mcore.inference.measure import ParallelSketch
    from megatron_mdm.mcore.model.inputs import ModelInputs, logits_to_tokens

    sketch = ParallelSketch(list(loaded.model.parameters()), SKETCH)
    gradients = []
    for micro_batch in batches:
        batch = micro_batch.batch
        inputs = ModelInputs.of_batch(batch, loaded.model)
        cross_entropy = inputs.cross_entropy(loaded.model, micro_batch.corruption.tokens)
        losses = micro_batch.losses(logits_to_tokens(cross_entropy, batch.mdm.shift), "rows")
        gradients.append(sketch.gradient(losses.numerator / losses.denominator))
    return float(torch.stack(gradients).double().var(dim=0).sum())


def training_batches(
    loaded: Any, settings: dict[str, Any], size: int, count: int
) -> Iterator["MicroBatch"]:
    """Draws batches on the device, as training with these settings would.

    Args:
        loaded: the loaded checkpoint.
        settings: settings of the objective, fields of MDMConfig.
        size: rows of a batch.
        count: number of batches.

    Yields:
        The rows of a batch and their masks.
    """
    import torch

    from megatron_mdm.config import destination
    from megatron_mdm.densities import fixed_sampler
    from megatron_mdm.mcore.data.batch import Batch
    from megatron_mdm.mcore.data.row_dataset import build_datasets
    from megatron_mdm.mcore.flags.arguments import finalize_args
    from megatron_mdm.mcore.training.corrupters import training_corrupter
    from megatron_mdm.mcore.training.micro_batch import MicroBatch

    args = copy.copy(loaded.args)
    args.micro_batch_size = args.global_batch_size = size
    args.seed += 1  # other masks than those that the checkpoint was trained on
    args.eval_interval = 1  # required, although nothing is validated here
    for name, value in settings.items():
        setattr(args, destination(name), value)
    loaded = dataclasses.replace(loaded, args=finalize_args(args))
    mdm = loaded.mdm
    sampler = fitted(loaded) if mdm.rate_sampler == "ppots" else fixed_sampler(mdm)
    corrupter = training_corrupter(mdm, sampler)
    dataset = build_datasets(args, mdm, [size * count, 0, 0])[0]
    assert dataset is not None
    for first in range(0, size * count, size):
        rows = [dataset[number] for number in range(first, first + size)]
        batch = Batch.of_rows(rows, mdm, loaded.tokenizer.eod).to(torch.cuda.current_device())
        yield MicroBatch.of(batch, corrupter)


def fitted(loaded: Any) -> Any:
    """Fits the density of P-POTS at a checkpoint, for its settings of masks and target."""
    from megatron_mdm.mcore.inference.measure import measure
    from megatron_mdm.objective.ppots.fit import fit

    mdm = loaded.mdm
    args = copy.copy(loaded.args)
    args.mdm_views = 1  # every row is a different text
    *_, (_, _, measured) = measure(
        dataclasses.replace(loaded, args=args),
        mdm.ppots_target,
        mdm.ppots_bins,
        RATE_ROWS,
        1,
    )
    return fit(
        measured.total,
        target=mdm.ppots_target,
        uniform_share=mdm.ppots_uniform_share,
        eps=mdm.least_masked_fraction(args.seq_length),
    ).sampler()


if __name__ == "__main__":
    run_tool(main)
