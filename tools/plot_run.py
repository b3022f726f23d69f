"""Shows a run: validation loss before and after, and a picture of loss, loss against t, gradient.

python tools/plot_run.py --tensorboard-dir runs/quickstart/tensorboard --output training.png
"""

import argparse
import os
import re

from megatron_mdm.errors import UserError, escaped, run_tool
from megatron_mdm.experiments.runs import read_scalars
from megatron_mdm.files import check_picture, complete_or_absent, write_errors

BIN = re.compile(r"mdm/validation loss at t ([\d.]+)-([\d.]+)")


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensorboard-dir", required=True, help="the run's --tensorboard-dir")
    parser.add_argument("--output", required=True, help="PNG, SVG or PDF to write")
    return parser.parse_args()


def main() -> None:
    """Reads, prints, draws."""
    options = parse()
    check_picture(options.output, "--output", (".png", ".svg", ".pdf"))
    if not os.path.isdir(options.tensorboard_dir):
        raise UserError(f"--tensorboard-dir {options.tensorboard_dir}: no such directory")
    try:
        scalars = read_scalars(options.tensorboard_dir)
    except OSError as error:
        raise UserError(
            f"--tensorboard-dir {options.tensorboard_dir} cannot be read: {error.strerror} "
            f"({os.fsdecode(error.filename or '')})"
        ) from error
    nelbo = scalars.get("mdm/validation NELBO", [])
    if not nelbo or "mdm loss" not in scalars:
        raise UserError(
            f"--tensorboard-dir {options.tensorboard_dir} has no run of megatron_mdm with a "
            "validation: "
            "give the directory that the run named as --tensorboard-dir"
        )
    errors = dict(scalars["mdm/validation NELBO stderr"])
    for index, when in ends(nelbo):
        step, value = nelbo[index]
        print(
            f"validation NELBO {when:6s} ({step} steps): {value:.3f} +- {errors[step]:.3f} "
            "nats/token"
        )
    draw(scalars, options.output)
    print(f"picture: {escaped(options.output)}")


def draw(scalars: dict[str, list[tuple[int, float]]], output: str) -> None:
    """Loss against steps, validation loss against the masking rate, gradient norm against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    steps, losses = zip(*scalars["mdm loss"], strict=True)
    is_bound = all(value for _, value in scalars.get("mdm/is bound", []))
    training = "training" if is_bound else "training (not always a bound)"
    left.plot(steps, losses, color="0.8", linewidth=0.7, label=f"{training}, each step")
    left.plot(steps, smooth(losses), color="C0", label=f"{training}, mean of 50 steps")
    left.plot(*zip(*scalars["mdm/validation NELBO"], strict=True), "C3o", label="validation")
    left.set(xlabel="step", ylabel="loss (nats/token)", title="Loss")
    left.legend()

    bins = sorted(
        (float(match[1]), float(match[2]), values)
        for name, values in scalars.items()
        if (match := BIN.fullmatch(name))
    )
    colors = {"before": "0.6", "after": "C3"}
    for index, when in ends(scalars["mdm/validation NELBO"]):
        middle.plot(
            [(low + high) / 2 for low, high, _ in bins],
            [values[index][1] for *_, values in bins],
            "o-",
            color=colors[when],
            label=f"{when} training",
        )
    middle.set(
        xlabel="masking rate t", ylabel="validation loss (nats/token)", title="Loss against t"
    )
    middle.set(xlim=(0, 1), ylim=(0, None))
    middle.legend()
    steps, norms = zip(*scalars["grad-norm"], strict=True)
    right.plot(steps, norms, color="0.8", linewidth=0.7, label="each step, before clipping")
    right.plot(steps, smooth(norms), color="C0", label="mean of 50 steps")
    right.set(xlabel="step", ylabel="norm of the gradient", title="Gradient", yscale="log")
    right.legend()
    with complete_or_absent(output) as (temporary,), write_errors(output):
        figure.savefig(temporary, dpi=90, format=output.rpartition(".")[2])


def ends(validations: list[tuple[int, float]]) -> list[tuple[int, str]]:
    """Index and name of the validations that are shown: the last one, and an earlier first one."""
    earlier = validations[0][0] < validations[-1][0]  # Megatron repeats the last one
    return [(0, "before"), (-1, "after")] if earlier else [(-1, "after")]


def smooth(values: tuple[float, ...], window: int = 50) -> list[float]:
    """Mean of the last `window` values at each place."""
    parts = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


if __name__ == "__main__":
    run_tool(main)
