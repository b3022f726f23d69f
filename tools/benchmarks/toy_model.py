"""A small transformer on bytes, trained in plain PyTorch, and measurements of its gradients."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks.python_text import MASK, VOCABULARY
from megatron_mdm.evaluation.nelbo import ScoredRow
from megatron_mdm.objective.corruption import Corruption
from megatron_mdm.objective.loss import row_losses
from megatron_mdm.objective.samplers import Uniform
from megatron_mdm.recipes import COMBINATIONS
from megatron_mdm.variance.methods import METHODS, FittedDensities, batches
from megatron_mdm.variance.report import Settings, densities, measure
from megatron_mdm.variance.sketch import MOST_WHOLE, Sketch
from megatron_mdm.variance.state import State

WIDTH, HEADS, LAYERS = 64, 4, 3
EPS = 1e-3


class Layer(nn.Module):
    """A transformer layer with bidirectional attention.

    Args:
        is_rotary: whether attention applies rotary position embeddings to queries and keys.
    """

    def __init__(self, is_rotary: bool) -> None:
        super().__init__()
        self.is_rotary = is_rotary
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps hidden states [B, L, WIDTH] to hidden states."""
        qkv = self.query_key_value(self.norms[0](hidden))
        q, k, v = qkv.unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        if self.is_rotary:
            q, k = rotated(q), rotated(k)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        hidden = hidden + self.output(mixed.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norms[1](hidden))


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Applies the rotary position embedding to queries or keys [B, heads, L, size]."""
    size = x.shape[-1]
    frequency = 10000.0 ** (-torch.arange(0, size, 2) / size)
    angle = torch.arange(x.shape[2])[:, None] * frequency
    a, b = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Model(nn.Module):
    """A bidirectional transformer of about 0.2M parameters.

    Args:
        length: number of learned absolute positions; None for rotary ones.
    """

    def __init__(self, length: int | None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(length, WIDTH)) if length else 0.0
        self.layers = nn.ModuleList(Layer(is_rotary=length is None) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps tokens [B, L] to hidden states [B, L, WIDTH] and logits [B, L, VOCABULARY]."""
        hidden = self.tokens(tokens) + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.norm(hidden)
        return hidden, self.head(hidden)


def losses(
    model: Model, tokens: torch.Tensor, corruption: Corruption
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the losses of rows [B], with importance weights, and the final hidden states.

    Args:
        model: the model.
        tokens: clean tokens, int64 [B, L], all of them eligible.
        corruption: corruption of these tokens.
    """
    hidden, logits = model(corruption.tokens)
    cross_entropy = nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    eligible = torch.full((len(tokens),), tokens.shape[1])
    found = row_losses(cross_entropy, corruption.mask, corruption.weight, eligible, "rows")
    return found.per_row, hidden


def train(model: Model, texts: torch.Tensor, batch: int, steps: int, seed: int) -> float:
    """Trains a model with the standard objective and Adam.

    Args:
        model: the model.
        texts: rows of tokens, int64 [N, L].
        batch: rows of a batch.
        steps: optimizer steps.
        seed: seed of the choice of rows, rates and masks.

    Returns:
        The mean loss of the last 100 steps, in nats per token.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    found = []
    for tokens, _, corruption in _take(texts, batch, steps, seed + 1):
        loss = losses(model, tokens, corruption)[0].mean()
        found.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return float(np.mean(found[-100:]))


def _take(
    texts: torch.Tensor, batch: int, steps: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Corruption]]:
    """Yields `steps` batches of the standard objective; see `variance.methods.batches`."""
    everywhere = torch.ones_like(texts, dtype=torch.bool)
    source = batches(texts, everywhere, METHODS["standard"], Uniform(), MASK, EPS, batch, seed)
    for _ in range(steps):
        yield next(source)


def settings(
    rows: int,
    batch: int,
    methods: tuple[str, ...],
    seed: int,
    isad_token_ids: tuple[int, ...] = (),
) -> Settings:
    """Returns the settings of a measurement on the model; see `variance.report.Settings`."""
    return Settings(
        rows=rows,
        rates=4,
        masks=2,
        batch=batch,
        bins=10,
        methods=methods,
        mask_token_id=MASK,
        eps=EPS,
        seed=seed,
        isad_token_ids=isad_token_ids,
    )


def measured(
    model: Model, texts: torch.Tensor, what: Settings
) -> tuple[State, Settings, list[ScoredRow]]:
    """Measures nested draws of the first texts; returns the arguments of `variance.report.report`.

    Args:
        model: the model.
        texts: rows of tokens, int64 [N, L].
        what: settings of the measurement.
    """
    sketch = Sketch(list(model.parameters()), MOST_WHOLE)

    def step(text: ScoredRow, corruption: Corruption) -> tuple[float, Any, float]:
        per_row, hidden = losses(model, text.tokens.expand_as(corruption.mask), corruption)
        loss = per_row.mean()
        return float(loss.detach()), *sketch.gradient_and_norm(loss, hidden)

    everywhere = torch.ones_like(texts[0], dtype=torch.bool)
    rows = [ScoredRow(tokens, everywhere) for tokens in texts[: what.rows]]
    state = State(what)
    with tqdm(unit="rows", total=what.rows * what.work_per_row) as bar:
        measure(step, rows, what, state, bar.update)
    return state, what, rows


def fitted_densities(model: Model, texts: torch.Tensor, seed: int) -> FittedDensities:
    """Fits a density of t to the model, for each target of P-POTS and kind of mask."""
    methods = ("ppots-loss", COMBINATIONS["ppots"])
    state, what, _ = measured(model, texts, settings(200, 2, methods, seed))
    return densities(state, what, texts.shape[1])
