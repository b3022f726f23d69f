"""Fits the density of the masking rate (P-POTS, arXiv 2511.18159) to a checkpoint.

    python tools/fit_ppots.py --load checkpoints --target gradient --output ppots.json
    python tools/fit_ppots.py --load checkpoints --data-path pairs --mdm-sft --output ppots.json

The first command measures the checkpoint on its training data and writes two files. ppots.json has
the density, for --mdm-ppots-file, and the standard errors. ppots.png shows the measured points with
error bars (twice the standard error of the choice of rows and masks), the means of the fit over the
same bins, and the density. The second command measures the data of a fine-tuning before it starts,
as the paper does with the loss. Under torchrun the ranks share the model as tensor-parallel ranks.

The density is proportional to the square root of the second moment at t. There are three families.
epr is the paper's: an exponential mean, and a variance of powers of t and 1 - t. power has a
variance that grows like a power of 1/t towards 0. piecewise takes the measured values and is linear
between the bins.
"""

import argparse
import contextlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megatron_mdm.checkpoint import add_checkpoint_arguments, open_asked_for
from megatron_mdm.config import MDMConfig, destination, flag_of
from megatron_mdm.errors import UserError, escaped, run_tool
from megatron_mdm.files import check_picture, write_text
from megatron_mdm.objective.ppots.families import FAMILIES
from megatron_mdm.objective.ppots.limits import MOST_PPOTS_BINS
from megatron_mdm.pictures import BLUE, ORANGE, blank_figure, legend_below, save, use_log_scale

if TYPE_CHECKING:
    import numpy as np

    from megatron_mdm.objective.ppots.fit import PpotsFit

# Fields of MDMConfig that determine which values are measured.
OBJECTIVE = ["sft", "isolate_documents", "rate_per", "mask", "normalization", "eod_eligible"]
OBJECTIVE += ["pad_eligible", "pad_response_to_multiple_of", "syrm_token_ids", "syrm_fraction"]


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_arguments(parser, pipeline=False)
    parser.add_argument("--output", required=True, metavar="X.json", help="JSON file to write")
    parser.add_argument(
        "--target",
        choices=["loss", "gradient"],
        default="loss",
        help="what is measured of a row: its loss, as in the paper, or the norm of the gradient of "
        "its loss at the final hidden states (default: %(default)s)",
    )
    parser.add_argument(
        "--family",
        choices=["auto", "epr", "power", "piecewise"],
        default="auto",
        help="family of densities; auto takes the family with the smallest Akaike criterion, which "
        "adds the number of parameters to the divergence from the measurement (default: "
        "%(default)s)",
    )
    parser.add_argument("--rates", type=int, default=30, help="number of bins of t (default: 30)")
    parser.add_argument("--rows", type=int, default=10, help="number of rows of text (default: 10)")
    parser.add_argument(
        "--masks", type=int, default=10, help="masks per rate and row (default: 10)"
    )
    parser.add_argument(
        "--uniform-share",
        type=float,
        default=0.1,
        help="share s of the uniform density, in (0, 1]; the importance weight is at most 1/s "
        "(default: 0.1)",
    )
    parser.add_argument("--data-path", nargs="+", help="data to measure on instead of the run's")
    group = parser.add_argument_group(
        "objective",
        "Settings of the run that will use the density, if they differ from those of the "
        "checkpoint. `python -m megatron_mdm.pretrain --help` explains them.",
    )
    for name in OBJECTIVE:
        kind = MDMConfig.__annotations__[name]
        values: dict[str, Any]
        if kind is bool:
            values = {"action": argparse.BooleanOptionalAction}
        elif kind in (int, float):
            values = {"type": kind, "metavar": "X"}
        elif name == "syrm_token_ids":
            values = {"type": int, "nargs": "+", "metavar": "ID"}
        else:
            values = {"choices": get_args(get_args(kind)[0]) or get_args(kind)}  # Literal | None
        group.add_argument(flag_of(name), default=None, **values)
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Checks what would otherwise fail after the measurement.

    Raises:
        UserError: names the flag.
    """
    if min(options.rates, options.rows, options.masks) < 1:
        raise UserError("--rates, --rows and --masks must be at least 1")
    if options.rates > MOST_PPOTS_BINS:
        raise UserError(f"--rates {options.rates}: at most {MOST_PPOTS_BINS}")
    if not 0.0 < options.uniform_share <= 1.0:
        raise UserError(f"--uniform-share must lie in (0, 1], got {options.uniform_share}")
    least = len(FAMILIES[options.family].names) if options.family in FAMILIES else 1
    if options.rates < least:
        raise UserError(
            f"--rates {options.rates}: --family {options.family} has {least} parameters; take more "
            "rates or --family piecewise"
        )
    output = Path(options.output)
    if output.suffix == ".png":
        raise UserError(f"--output {output}: .png is the picture's suffix; take .json")
    check_picture(str(output.with_suffix(".png")), "--output: its picture")
    if output.is_dir() or not os.access(output.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {output} cannot be written: give a file in a directory of yours")


def take_over(options: argparse.Namespace, args: argparse.Namespace) -> None:
    """Turns the arguments of the checkpoint into those of the run that will use the density.

    Raises:
        UserError: flags that contradict each other, or the checkpoint's.
    """
    if options.data_path:
        args.data_path, args.mock_data = options.data_path, False
        args.split = args.split or "100,0,0"
        args.train_data_path = args.valid_data_path = args.test_data_path = None
        args.data_args_path = args.per_split_data_args_path = args.mdm_validation_sets = None
        if args.data_cache_path and not os.path.isdir(args.data_cache_path):
            args.data_cache_path = None  # it is on another machine
    for name in map(destination, OBJECTIVE):
        if getattr(options, name) is not None:
            setattr(args, name, getattr(options, name))
    # Settings that only the checkpoint's rows can use, and that would be refused with other rows.
    # ISAD is left out because its masks are not the ones that are measured.
    idle = ["isad_token_ids", "isad_delta", "isad_weight"]
    if getattr(args, "mdm_sft", False):
        idle += ["random_length_fraction", "anneal_attention_iters"]
    else:
        idle += ["syrm_token_ids", "syrm_fraction", "pad_response_to_multiple_of"]
    for name in idle:
        if getattr(options, destination(name), None) is None:
            setattr(args, destination(name), getattr(MDMConfig, name))
    MDMConfig.from_args(args)


def main() -> None:
    """Measures, fits, writes, draws."""
    options = parse()
    check(options)
    with open_asked_for(options, partial(take_over, options)) as loaded:
        from tqdm import tqdm

        from megatron_mdm.mcore.inference.measure import measure
        from megatron_mdm.objective.ppots.fit import fit
        from megatron_mdm.objective.ppots.fit_file import sampler_text

        # Megatron prints where the data come from.
        with contextlib.redirect_stdout(sys.stderr):
            draws = measure(loaded, options.target, options.rates, options.rows, options.masks)
            done = 0
            with tqdm(unit="draws", total=options.rates * options.rows * options.masks) as bar:
                for done, _, measured in draws:  # noqa: B007
                    bar.update(done - bar.n)
        result = fit(
            measured.total,
            family=options.family,
            target=options.target,
            uniform_share=options.uniform_share,
            eps=loaded.mdm.least_masked_fraction(loaded.args.seq_length),
            errors=measured.errors(),
        )
        if loaded.args.rank == 0:
            write_text(options.output, sampler_text(result))
            picture = Path(options.output).with_suffix(".png")
            draw(result, picture)
            parameters = ", ".join(f"{k} {v:.4g}" for k, v in result.parameters.items())
            output = escaped(options.output)
            print(f"{output}: {result.family} fit of the {options.target} over {done} draws")
            if result.moments.skipped:
                print(f"{result.moments.skipped} draws without a finite value were left out")
            print(f"parameters: {parameters or 'the measured bins'}")
            print(f"standard error of the second moment: {errors_in_words(result)}")
            print("KL of each family: " + ", ".join(f"{k} {v:.2e}" for k, v in result.kls.items()))
            print(f"picture: {escaped(str(picture))}")


def errors_in_words(result: "PpotsFit") -> str:
    """Relative standard errors: the median of all bins, and the largest."""
    import numpy as np

    if result.errors is None:
        return "not known, since it is that of the choice of rows: take --rows 2 or more"
    square = result.moments.second_moment()
    relative = np.divide(result.errors, square, out=np.zeros_like(square), where=square > 0.0)
    worst, n = int(relative.argmax()), len(relative)
    return (
        f"{np.median(relative):.1%} (median), {relative[worst]:.1%} at most, for t in "
        f"({worst / n:.3g}, {(worst + 1) / n:.3g}]"
    )


def draw(result: "PpotsFit", picture: Path) -> None:
    """Writes the picture of a fit (see `fill`)."""
    with blank_figure() as figure:
        fill(figure, result)
        save(figure, str(picture))


def fill(figure: Any, result: "PpotsFit") -> None:
    """Measured bins with error bars, the same means of the fit, and the density against t.

    The measured value of a bin is a root mean square over the bin. The fit is drawn the same way,
    because the mean of a steep density differs from its value at the middle of the bin.
    """
    import numpy as np

    square = result.moments.second_moment()
    n, scale = len(square), np.sqrt(square).mean()
    measured, label = np.sqrt(square) / scale, "measured in bins"
    low = high = measured
    if result.errors is not None:
        twice = 2 * np.array(result.errors)
        low, high = (np.sqrt((square + x).clip(min=0.0)) / scale for x in (-twice, twice))
        label = "measured in bins, twice the standard error"
    figure.set_size_inches(6.5, 4.8)
    axes = figure.add_subplot()
    centers, edges = (np.arange(n) + 0.5) / n, np.arange(n + 1) / n
    edges[0] = centers[0] / 2  # where the logarithmic axis begins
    bars = None if result.errors is None else (measured - low, high - measured)
    axes.errorbar(centers, measured, bars, fmt="o", color="black", label=label, lw=1.0)
    if result.uniform_share < 1.0:  # the density without its uniform part
        means = fitted_bins(result)
        label = f"fit in bins: {result.family}"
        axes.stairs(means / means.mean(), edges, baseline=None, color=BLUE, label=label)
    t = np.geomspace(edges[0], 1.0, 500)
    drawn = density(result, t)
    label = f"density of t, uniform share {result.uniform_share:g}"
    axes.plot(t, drawn, "--", color=ORANGE, label=label)
    axes.set(xlabel="masking rate t", ylabel="relative to the mean", xlim=(edges[0], 1.05))
    # An error bar that reaches 0 goes to the end of the axis.
    floor = measured[measured > 0.0].min() / 5
    least = min(*low[low > floor], *measured[measured > 0.0], drawn.min())
    axes.set_ylim(0.8 * least, 1.2 * max(high.max(), drawn.max()))
    use_log_scale(axes.xaxis)
    use_log_scale(axes.yaxis)
    legend_below(axes)


def density(result: "PpotsFit", t: "np.ndarray") -> "np.ndarray":
    """The density from which rates are drawn, at rates t [n]."""
    import torch

    values: np.ndarray = result.sampler().density(torch.from_numpy(t)).numpy()
    return values


def fitted_bins(result: "PpotsFit", points: int = 200) -> "np.ndarray":
    """Root mean squares over the measured bins of the fitted density without its uniform part.

    Args:
        result: a fit whose uniform share is below 1.
        points: number of points per bin for the mean.
    """
    import numpy as np

    n = result.moments.num_bins
    t = (np.arange(n * points) + 0.5) / (n * points)
    share = result.uniform_share
    fitted = ((density(result, t) - share) / (1 - share)).reshape(n, points)
    means: np.ndarray = np.sqrt(np.square(fitted).mean(axis=1))
    return means


if __name__ == "__main__":
    run_tool(main)
