"""How much each method lowers the variance of the gradient, on a small model trained here.

A byte-level model is trained on the source of Python's standard library with the standard
objective; then, with its weights fixed, gradients of whole batches are drawn again and again under
every method. The figures are the trace of their covariance and the variance of the batch's loss,
relative to `standard`. Batches hold equally many rows, which is equal compute; MIRROR stands in the
table a second time at equal texts, where it has twice the rows. One training run and one kind of
text: the shares of masking and data noise move with the length of a row and with training.
"""

import argparse
import json
import pathlib
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from megatron_mdm.data.outputs import write_text

DESCRIPTION = "variance of gradient and loss under each method, against standard"
VOCABULARY, MASK, WIDTH = 257, 256, 64
EPS = 1e-3
SEED = 1234


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument("--quick", action="store_true", help="fewer steps and draws")
    parser.add_argument("--length", type=int, default=64, help="row length (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (default: 2000; quick: 600)")
    parser.add_argument(
        "--batch", type=int, default=32, help="rows of a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--positions",
        choices=["learned_absolute", "rope"],
        default="learned_absolute",
        help="with learned ones long rows stay on the plateau without context "
        "(default: %(default)s)",
    )
    parser.add_argument("--draws", type=int, help="batches a method (default: 400; quick: 100)")


def run(args: argparse.Namespace) -> None:
    """Trains, measures, prints a table, and writes `args.json` if it is set."""
    import torch

    from megatron_mdm.objective.variance import METHODS, Sketch, method_variance, ratio

    torch.manual_seed(SEED)
    steps = args.steps or (600 if args.quick else 2000)
    draws = args.draws or (100 if args.quick else 400)
    texts = _texts(args.length)
    draw = partial(_batches, texts, args.batch)
    model = _model(args.length if args.positions == "learned_absolute" else None)
    trained = _train(model, draw, steps)
    samplers = _fit(model, draw)
    parameters = Sketch(list(model.parameters()), size=None)

    def step(tokens: Any, _: Any, corruption: Any) -> tuple[float, Any]:
        loss = _losses(model, tokens, corruption)[0].mean()
        return float(loss), parameters.gradient(loss)

    results = []
    print(f"length {args.length}, {steps} steps to a loss of {trained:.2f} nats per token")
    print(f"{draws} batches of {args.batch} rows a method")
    print(f"{'method':42s} {'per':5s} {'gradient':>16s} {'loss':>16s}")
    baseline = None
    for name, method in METHODS.items():
        source = draw(name, samplers[method.target, method.mask], stream=3)
        measured = method_variance(step, source, draws)
        baseline = baseline or measured
        g, dg = ratio(measured.gradient, baseline.gradient)
        v, dv = ratio(measured.loss, baseline.loss)
        print(f"{name:42s} {method.per:5s} {g:7.3f} +- {dg:.3f} {v:7.3f} +- {dv:.3f}")
        results.append(
            {
                "method": name,
                "gradient_variance_ratio": g,
                "gradient_variance_ratio_stderr": dg,
                "loss_variance_ratio": v,
                "loss_variance_ratio_stderr": dv,
                "per": method.per,
            }
        )
    if args.json:
        setting = {name: getattr(args, name) for name in ("length", "batch", "positions")}
        setting["steps"] = steps
        document = {**setting, "loss": trained, "rows": results}
        write_text(args.json, json.dumps(document) + "\n")


def _texts(length: int) -> Any:
    """Rows of bytes of the standard library, shuffled, int64 [N, L]."""
    import torch

    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    data = b"".join(path.read_bytes() for path in sorted(root.glob("*.py")))
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    rows = rows[: len(rows) // length * length].view(-1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))]


def _model(length: int | None) -> Any:
    """A bidirectional transformer of about 0.2M parameters: tokens [B, L] -> (hidden, logits).

    Args:
        length: of learned absolute positions; None for rotary ones.
    """
    import torch
    from torch import nn

    heads = 4
    size = WIDTH // heads

    def rotated(x: torch.Tensor) -> torch.Tensor:
        """Rotary position embedding of [B, heads, L, size]."""
        if length:
            return x
        frequency = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angle = torch.arange(x.shape[2])[:, None] * frequency
        a, b = x.chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
            self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
            self.output = nn.Linear(WIDTH, WIDTH)
            self.mlp = nn.Sequential(
                nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
            )

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            qkv = self.query_key_value(self.norms[0](hidden))
            q, k, v = qkv.unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(rotated(q), rotated(k), v)
            hidden = hidden + self.output(mixed.transpose(1, 2).flatten(2))
            return hidden + self.mlp(self.norms[1](hidden))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(VOCABULARY, WIDTH)
            self.positions = nn.Parameter(0.02 * torch.randn(length, WIDTH)) if length else 0.0
            self.layers = nn.ModuleList(Layer() for _ in range(3))
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, VOCABULARY)

        def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = self.tokens(tokens) + self.positions
            for layer in self.layers:
                hidden = layer(hidden)
            hidden = self.norm(hidden)
            return hidden, self.head(hidden)

    return Model()


def _batches(texts: Any, size: int, name: str, sampler: Any, stream: int) -> Iterator[Any]:
    """Endless batches of a method; see `objective.variance.batches`."""
    import torch

    from megatron_mdm.objective.variance import METHODS, batches

    everywhere = torch.ones_like(texts, dtype=torch.bool)
    return batches(texts, everywhere, METHODS[name], sampler, MASK, EPS, size, SEED + stream)


def _losses(model: Any, tokens: Any, corruption: Any) -> tuple[Any, Any]:
    """Losses of the rows, weights included, and the final hidden states."""
    import torch

    from megatron_mdm.objective.loss import row_losses

    hidden, logits = model(corruption.tokens)
    cross_entropy = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), tokens, reduction="none"
    )
    eligible = torch.full((len(tokens),), tokens.shape[1])
    losses = row_losses(cross_entropy, corruption.mask, corruption.weight, eligible, "rows")
    return losses.per_row, hidden


def _train(model: Any, draw: Callable[..., Iterator[Any]], steps: int) -> float:
    """Trains with the standard objective and Adam; the mean loss of the last 100 steps."""
    import torch

    from megatron_mdm.objective.samplers import Uniform

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    batches = draw("standard", Uniform(), stream=1)
    losses = []
    for _ in range(steps):
        per_row, _ = _losses(model, *next(batches)[::2])
        losses.append(float(per_row.mean().detach()))
        optimizer.zero_grad()
        per_row.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return float(np.mean(losses[-100:]))


def _fit(model: Any, draw: Callable[..., Iterator[Any]]) -> dict[tuple[str | None, str], Any]:
    """Densities of t for each target and kind of mask, on rows that the measurement does not use.

    What a fit sees is what it is for: the noise of the count is a part of what Bernoulli masks do.
    """
    import torch

    from megatron_mdm.objective.fits import fit
    from megatron_mdm.objective.pots import RateMoments
    from megatron_mdm.objective.samplers import Uniform

    samplers: dict[tuple[str | None, str], Any] = {}
    for name, mask in (("lattice", "bernoulli"), ("lattice + exact count", "exact-count")):
        moments = {target: RateMoments(30) for target in ("loss", "gradient")}
        batches = draw(name, Uniform(), stream=2)
        for _ in range(200):
            tokens, _, corruption = next(batches)
            per_row, hidden = _losses(model, tokens, corruption)
            (gradient,) = torch.autograd.grad(per_row.sum(), hidden)
            norms = gradient.square().sum(dim=(1, 2)).sqrt()
            for target, value in (("loss", per_row.detach()), ("gradient", norms)):
                moments[target].update(corruption.t, value, corruption.rate_weight)
        eps = 1 / tokens.shape[1] if mask == "exact-count" else EPS
        samplers[None, mask] = Uniform()
        for target, measured in moments.items():
            samplers[target, mask] = fit(measured, target=target, eps=eps).sampler()
    return samplers
