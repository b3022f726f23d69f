"""How much each method lowers the variance of the gradient, on a small model trained here.

A byte-level model is trained on the source of Python's standard library with the standard
objective; then, with its weights fixed, losses and gradients of rows under nested rates and masks
give the shares of masking and data noise, and what every method leaves of the variance of a batch
(see tools/variance_report.py), relative to `standard`. Batches hold equally many rows, which is
equal compute; MIRROR and other views stand in the table a second time at equal texts, where they
have more rows. One training run and one kind of text: the shares of masking and data noise move
with the length of a row and with training.
"""

import argparse
import pathlib
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from megatron_mdm.errors import check_numbers
from megatron_mdm.files import write_json

DESCRIPTION = "variance of gradient and loss under each method, against standard"
VOCABULARY, MASK, WIDTH = 257, 256, 64
DELIMITERS = tuple(b"\n:()")  # what ISAD masks more often
EPS = 1e-3
SEED = 1234


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument("--quick", action="store_true", help="fewer steps and rows")
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
    parser.add_argument("--rows", type=int, help="rows measured (default: 400; quick: 100)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["important"],
        metavar="NAME",
        help="`important`, `all` (every combination), or names out of these (default: important)",
    )


def run(args: argparse.Namespace) -> None:
    """Trains, measures, prints a table, and writes `args.json` if it is set.

    Raises:
        UserError: settings that cannot work.
    """
    import torch

    from megatron_mdm.variance.figure import as_text
    from megatron_mdm.variance.methods import choose
    from megatron_mdm.variance.report import report

    check_numbers(args, "length", least=2)
    check_numbers(args, "steps")
    torch.manual_seed(SEED)
    steps = args.steps or (600 if args.quick else 2000)
    rows = args.rows or (100 if args.quick else 400)
    methods = choose(args.methods, isad=True)
    settings = _settings(rows, args.batch, methods)  # complains before anything is trained
    texts = _texts(args.length)
    model = _model(args.length if args.positions == "learned_absolute" else None)
    trained = _train(model, partial(_batches, texts, args.batch), steps)
    print(f"length {args.length}, {steps} steps to a loss of {trained:.2f} nats per token")
    print(f"{rows} rows, {settings.rates} rates, {settings.masks} masks; batches of {args.batch}")
    measured = report(*_measured(model, texts, settings))
    print(as_text(measured))
    results = [
        {
            "method": row["method"],
            "gradient_variance_ratio": row["gradient"][0],
            "gradient_variance_ratio_stderr": row["gradient"][1],
            "loss_variance_ratio": row["loss"][0],
            "loss_variance_ratio_stderr": row["loss"][1],
            "per": row["per"],
            "unbiased": row["unbiased"],
        }
        for row in measured["methods"]
    ]
    if args.json:
        setting = {name: getattr(args, name) for name in ("length", "batch", "positions")}
        parts = {what: measured[what] for what in ("loss", "gradient")}
        document = {**setting, "steps": steps, "loss": trained, "variance": parts}
        write_json(args.json, {**document, "rows": results})


def _settings(rows: int, batch: int, methods: tuple[str, ...]) -> Any:
    from megatron_mdm.variance.report import Settings

    return Settings(
        rows=rows,
        rates=4,
        masks=2,
        batch=batch,
        bins=10,
        methods=methods,
        mask_token_id=MASK,
        eps=EPS,
        seed=SEED,
        isad_token_ids=DELIMITERS,
    )


def _measured(model: Any, texts: Any, settings: Any) -> tuple[Any, Any, list[Any]]:
    """Nested draws of the first texts, as `variance_report.report` takes them."""
    import torch
    from tqdm import tqdm

    from megatron_mdm.evaluation.nelbo import ScoredRow
    from megatron_mdm.variance.report import measure
    from megatron_mdm.variance.sketch import MOST_WHOLE, Sketch
    from megatron_mdm.variance.state import State

    parameters = list(model.parameters())
    sketch = Sketch(parameters, MOST_WHOLE)

    def step(text: Any, corruption: Any) -> tuple[float, Any, float]:
        per_row, hidden = _losses(model, text.tokens.expand_as(corruption.mask), corruption)
        loss = per_row.mean()
        return float(loss.detach()), *sketch.gradient_and_norm(loss, hidden)

    everywhere = torch.ones_like(texts[0], dtype=torch.bool)
    rows = [ScoredRow(tokens, everywhere) for tokens in texts[: settings.rows]]
    state = State(settings)
    with tqdm(unit="rows", total=settings.rows * settings.work_per_row) as bar:
        measure(step, rows, settings, state, bar.update)
    return state, settings, rows


def _densities(model: Any, texts: Any) -> dict[tuple[str | None, str], Any]:
    """Densities of t for each target and kind of mask, fitted to the model."""
    from megatron_mdm.variance.report import densities

    methods = ("ppots-loss", "ppots-gradient+lattice+exact-count")
    state, settings, _ = _measured(model, texts, _settings(200, 2, methods))
    return densities(state, settings, texts.shape[1])


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
    """Endless batches of a method; see `objective.methods.batches`."""
    import torch

    from megatron_mdm.variance.methods import METHODS, batches

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
