"""SIMULATED on the CPU: how large loss weights affect gradients in FP8.

    python examples/studies/fp8_simulation/simulate.py --json fp8.json

The program trains a byte-level model on the source code of Python's standard library with the
standard objective. Then the weights are fixed, and the tensors of the two backward products of
every linear layer, x^T g and g W, are rounded to FP8 as in Transformer Engine's per-tensor recipes.
The products are compared with those in float32: the errors of the weight gradient, summed over a
batch, and of the input gradient, and the shares of entries of g that saturate or become 0.
`current` scales a tensor by its own largest entry (--fp8-recipe tensorwise). `delayed` scales it by
the largest entry of earlier micro-batches: of the last one (Megatron's default) or of up to 1024
(--fp8-amax-history-len 1024 --fp8-amax-compute-algo max), with --fp8-margin 0 or 4. x and W are
rounded to e4m3, and g to e5m2 (--fp8-format hybrid) or e4m3.

The errors are those of single layers with exact inputs, so they do not accumulate over layers. No
GPU kernel has run. Rows have few tokens, so the largest weight of exact-count masks is small.
"""

import argparse
import math
import pathlib
import statistics
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_mdm.errors import UserError, check_numbers, run_tool
from megatron_mdm.files import write_json
from megatron_mdm.objective.loss import row_losses
from megatron_mdm.variance.methods import Method, batches

sys.path.insert(0, str(pathlib.Path(__file__).parents[3] / "tools"))

from benchmarks import python_text, toy_model

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
ROWS = 32  # rows of a batch, over all its micro-batches
SEED = 1234


@dataclass(frozen=True)
class Scaling:
    """A way of scaling and rounding tensors; x and W are always rounded to e4m3.

    Attributes:
        history: number of earlier micro-batches whose largest entries determine the scale; 0: the
            tensor's own largest entry determines it.
        gradient: format of g, a key of `LARGEST`.
        margin: powers of two between the largest entry and the largest number of the format.
    """

    history: int
    gradient: str = "float8_e5m2"
    margin: int = 0


SCALINGS = {
    "current": Scaling(0),
    "current, e4m3": Scaling(0, "float8_e4m3fn"),
    "delayed 1": Scaling(1),
    "delayed 1, margin 4": Scaling(1, margin=4),
    "delayed 1024": Scaling(1024),
    "delayed 1024, e4m3": Scaling(1024, "float8_e4m3fn"),
}


@dataclass(frozen=True)
class Setting:
    """The objective that draws rates, masks and weights.

    Attributes:
        method: name of a method or recipe; see `recipes.settings_of`.
        eps: smallest masking probability of Bernoulli masks.
        normalization: normalization for rows with different numbers of eligible tokens; None: all
            tokens are eligible.
    """

    method: str
    eps: float = toy_model.EPS
    normalization: Literal["tokens", "rows"] | None = None


# Settings that are a method or a recipe have its name.
SETTINGS = {
    "standard": Setting("standard"),
    "standard, eps 0.01": Setting("standard", eps=1e-2),
    "standard, eps 0.05": Setting("standard", eps=5e-2),
    "exact-count": Setting("exact-count"),
    "paper": Setting("paper"),
    "ppots": Setting("ppots"),
    "ppots-gradient+lattice": Setting("ppots-gradient+lattice"),
    "clipped": Setting("clipped"),
    "uneven rows, tokens": Setting("standard", normalization="tokens"),
    "uneven rows, rows": Setting("standard", normalization="rows"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command-line options of the study."""
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    for name, value, text in (
        ("length", 128, "tokens of a row"),
        ("steps", 400, "training steps"),
        ("batches", 10, f"batches of {ROWS} rows that each setting is measured on"),
        ("micro-batch", 4, "rows that are scaled together"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=value, metavar="N", help=f"{text} (default: {value})"
        )


def run(args: argparse.Namespace) -> None:
    """Trains, measures, prints tables, and writes the file `args.json` if it is given.

    Raises:
        UserError: a setting is not possible.
    """
    check_numbers(args, "length", "steps", "batches")
    if args.micro_batch < 2 or args.micro_batch % 2 or ROWS % args.micro_batch:
        raise UserError(
            f"--micro-batch {args.micro_batch}: must be even, for MIRROR, and divide {ROWS}"
        )
    torch.manual_seed(SEED)
    model, texts = toy_model.Model(None), python_text.rows(args.length, SEED)
    loss = toy_model.train(model, texts, ROWS, args.steps, SEED)
    samplers = toy_model.fitted_densities(model, texts, SEED)
    print(f"SIMULATED: length {args.length}, {args.steps} steps to a loss of {loss:.2f}, then")
    print(f"{args.batches} batches of {ROWS} rows a setting, {args.micro_batch} scaled together")
    rows = []
    for name, setting in SETTINGS.items():
        measured = _measure(model, texts, samplers, setting, args)
        print(f"\n{name}\n{_table(measured)}", flush=True)
        rows += [{"setting": name, **row} for row in measured]
    if args.json:
        names = ("length", "steps", "batches", "micro_batch")
        numbers = {name: getattr(args, name) for name in names}
        document = {"simulated": True, **numbers, "loss": loss, "rows": rows}
        write_json(args.json, document)


class Scale:
    """The scale of one tensor of one layer, updated with each micro-batch.

    It follows Transformer Engine: if the largest entry is zero or infinite, the last scale stays;
    the first delayed scale is 1.

    Args:
        scaling: the way of scaling, for its history and margin.
        largest: largest number of the format.
    """

    def __init__(self, scaling: Scaling, largest: float) -> None:
        self.largest = largest / 2**scaling.margin
        self.value = 1.0
        history = scaling.history
        self._earlier: deque[float] | None = deque(maxlen=history) if history else None

    def __call__(self, amax: float) -> float:
        """Returns the scale for a tensor whose largest entry is `amax`, and records `amax`."""
        known = [amax] if self._earlier is None else self._earlier
        top = max(known, default=0.0)
        if self._earlier is not None:
            self._earlier.append(amax)
        if 0.0 < top < math.inf:
            self.value = self.largest / top
        return self.value


def rounded(values: torch.Tensor, dtype: str, scale: float) -> torch.Tensor:
    """Rounds values to FP8: scales, saturates, rounds, and scales them back.

    Args:
        values: float32, of any shape.
        dtype: a key of `LARGEST`.
        scale: scale of the tensor, see `Scale`.
    """
    largest = LARGEST[dtype]
    scaled = (values * scale).clamp(-largest, largest)
    return scaled.to(getattr(torch, dtype)).float() / scale


class Meter:
    """Measures the errors of all linear layers' backward products under one way of rounding.

    Args:
        scaling: the way of scaling and rounding.

    Attributes:
        errors: relative error of the weight gradient of each micro-batch: the norm of the error
            over the norm of the gradient, over all layers together.
        batch_errors: the same for the sum over the micro-batches of a batch.
        batch_lengths: projection of that sum on the exact sum, in units of the exact sum; a value
            below 1 means that the sum is too short.
    """

    def __init__(self, scaling: Scaling) -> None:
        self.errors: list[float] = []
        self.batch_errors: list[float] = []
        self.batch_lengths: list[float] = []
        self.counting = True
        self._scaling = scaling
        self._scales: dict[tuple[str, str], Scale] = {}
        self._entries = self._saturated = self._zeroed = 0
        self._input_error = self._input_exact = 0.0
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._batch: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, layer: str, x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> None:
        """Adds one layer of a micro-batch.

        Args:
            layer: name of the layer.
            x: input, float32 [n, i].
            w: weight, float32 [o, i].
            g: gradient at the output, float32 [n, o].
        """
        scales = [
            self._scale(layer, name, values, dtype)
            for name, values, dtype in (
                ("x", x, "float8_e4m3fn"),
                ("w", w, "float8_e4m3fn"),
                ("g", g, self._scaling.gradient),
            )
        ]
        qx, qw = (rounded(v, "float8_e4m3fn", s) for v, s in zip((x, w), scales, strict=False))
        qg = rounded(g, self._scaling.gradient, scales[2])
        self._layers.append(((qg.t() @ qx).flatten(), (g.t() @ x).flatten()))
        if self.counting:
            exact = g @ w
            self._input_error += float((qg @ qw - exact).square().sum())
            self._input_exact += float(exact.square().sum())
            # With the tensor's own scale, the largest entry can exceed the limit by a rounding
            # error.
            top = LARGEST[self._scaling.gradient] * (1.0 + 1e-6) / scales[2]
            self._entries += int((g != 0).sum())
            self._saturated += int((g.abs() > top).sum())
            self._zeroed += int(((qg == 0) & (g != 0)).sum())

    def end_micro_batch(self) -> None:
        """Ends a micro-batch after all its layers were added."""
        ours, exact = (torch.cat(parts) for parts in zip(*self._layers, strict=True))
        self._layers = []
        self._batch.append((ours, exact))
        if self.counting:
            self.errors.append(_relative(ours - exact, exact))

    def end_batch(self) -> None:
        """Ends a batch after all its micro-batches; the optimizer would now use their sum."""
        ours, exact = (sum(parts) for parts in zip(*self._batch, strict=True))
        self._batch = []
        if self.counting:
            self.batch_errors.append(_relative(ours - exact, exact))
            self.batch_lengths.append(float(ours @ exact / (exact @ exact)))

    def summary(self, largest_weights: list[float]) -> dict[str, float]:
        """Returns means over everything that was added.

        Args:
            largest_weights: largest weight of a token in each micro-batch.
        """
        order = sorted(range(len(self.errors)), key=lambda i: -largest_weights[i])
        heavy = order[: max(1, len(order) // 10)]
        return {
            "weight_gradient_error": statistics.mean(self.batch_errors),
            "weight_gradient_error_heaviest": statistics.mean(self.errors[i] for i in heavy),
            "weight_gradient_length": statistics.mean(self.batch_lengths),
            "input_gradient_error": math.sqrt(self._input_error / self._input_exact),
            "saturated": self._saturated / self._entries,
            "zeroed": self._zeroed / self._entries,
        }

    def _scale(self, layer: str, name: str, values: torch.Tensor, dtype: str) -> float:
        new = Scale(self._scaling, LARGEST[dtype])
        return self._scales.setdefault((layer, name), new)(float(values.abs().max()))


def _relative(error: torch.Tensor, exact: torch.Tensor) -> float:
    return float(error.norm() / exact.norm()) if exact.any() else 0.0


def _measure(
    model: Any, texts: Any, samplers: dict, setting: Setting, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Returns a table row for each way of rounding, measured on the same micro-batches."""
    method = Method.of(setting.method)
    sampler = method.sampler(samplers)
    eligible = torch.ones_like(texts, dtype=torch.bool)
    if setting.normalization:
        lengths = torch.randint(1, texts.shape[1] + 1, (len(texts), 1))
        eligible = torch.arange(texts.shape[1]) < lengths
    source = batches(
        texts, eligible, method, sampler, python_text.MASK, setting.eps, args.micro_batch, SEED
    )
    meters = {name: Meter(scaling) for name, scaling in SCALINGS.items()}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    weights: list[float] = []
    for batch in range(args.batches + 1):  # the first one is not counted: delayed scales settle
        for _ in range(ROWS // args.micro_batch):
            tokens, able, corruption = next(source)
            captured = _captured(layers)
            _, logits = model(corruption.tokens)
            cross_entropy = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), tokens, reduction="none"
            )
            losses = row_losses(
                cross_entropy,
                corruption.mask,
                corruption.weight,
                able.sum(dim=1),
                setting.normalization or "tokens",
            )
            losses.numerator.backward()
            tensors = captured()
            for meter in meters.values():
                meter.counting = batch > 0
                for name, (x, g) in tensors.items():
                    meter.add(name, x, layers[name].weight.detach(), g)
                meter.end_micro_batch()
            if batch:
                weights.append(float(corruption.largest_weight.max()))
        for meter in meters.values():
            meter.end_batch()
    return [
        {"scaling": name, "largest_weight": max(weights), **meter.summary(weights)}
        for name, meter in meters.items()
    ]


def _captured(layers: dict[str, Any]) -> Callable[[], dict[str, list[torch.Tensor]]]:
    """Records the next pass; returns a function that returns each layer's x [n, i] and g [n, o]."""
    tensors: dict[str, list] = {}
    handles = []

    def look(name: str) -> Any:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            tensors[name] = [inputs[0].detach().flatten(0, -2)]
            output.register_hook(lambda g: tensors[name].append(g.flatten(0, -2)))

        return hook

    handles += [layer.register_forward_hook(look(name)) for name, layer in layers.items()]

    def result() -> dict[str, list]:
        for handle in handles:
            handle.remove()
        return tensors

    return result


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"largest weight {rows[0]['largest_weight']:.0f}",
        f"{'':22s}{'dW error':>9s}{'heaviest':>9s}{'length':>8s}{'dX error':>9s}"
        f"{'saturated':>11s}{'to 0':>11s}",
    ]
    for row in rows:
        lines.append(
            f"{row['scaling']:22s}{row['weight_gradient_error']:9.1%}"
            f"{row['weight_gradient_error_heaviest']:9.1%}{row['weight_gradient_length']:8.3f}"
            f"{row['input_gradient_error']:9.1%}{row['saturated']:11.1e}{row['zeroed']:11.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    """Reads the flags and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    run_tool(main)
