"""Measures the variance of a model's loss and gradient, given a callable that computes both.

Nested draws of rows, rates and masks give A, B and C (decomposition.py). Blocks or documents of a
row may have rates of their own, and a draw of rates then draws all of them anew. With other kinds
of masks and several views of a text at the same rates, the draws give the variance under every
method, relative to `standard` (methods.py). The same rows with a causal attention mask give the C
of autoregressive training, whose variance has no other part. The measurements are kept in a file,
so that an interrupted measurement can be resumed.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.evaluation.nelbo import ScoredRow, num_documents
from megatron_mdm.objective.blocks import block_segments
from megatron_mdm.objective.corruption import Corruption
from megatron_mdm.objective.ppots.fit import Target, fit
from megatron_mdm.objective.ppots.moments import RateMoments
from megatron_mdm.objective.quantiles import Quantiles
from megatron_mdm.objective.randomness import GRID_BITS, Split, row_uniforms, to_unit
from megatron_mdm.objective.samplers import RateSampler, Uniform
from megatron_mdm.objective.segments import to_positions
from megatron_mdm.objective.types import Floats
from megatron_mdm.objective.views import view_uniforms
from megatron_mdm.variance.decomposition import (
    NestedDraws,
    between_row_variance,
    curve,
    decompose,
    nested_sampler,
    resampled,
    with_error,
)
from megatron_mdm.variance.methods import (
    METHODS,
    FittedDensities,
    MaskKind,
    Method,
    MethodDraws,
    batch_variance,
    bin_covariance,
    corrupter_of,
)
from megatron_mdm.variance.state import Row, State

# (a text of L tokens, its masked views [K, L]) -> mean loss of the views, its gradient, float32
# [d], and the norm of its gradient with respect to the final hidden states
Step = Callable[[ScoredRow, Corruption], tuple[float, torch.Tensor, float]]
# a text -> mean next-token loss and its gradient, float32 [d]
CausalStep = Callable[[ScoredRow], tuple[float, torch.Tensor]]
FIT_BINS = 30
EMA_BINS = 10
RateUnit = Literal["row", "document", "block"]


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Attributes:
        rows: number of rows of the nested draws, n0, at least 2.
        rates: rates for each row, nt, at least 3.
        masks: masks at each rate, nm, at least 2.
        batch: number of rows in a batch of `standard`, for the table of methods.
        bins: bins of t in the curves.
        methods: names in `METHODS`; empty: no table of methods.
        mask_token_id: token id that replaces masked tokens.
        eps: least masking probability of Bernoulli masks.
        seed: seed of rates and masks.
        isad_token_ids: tokens that ISAD masks more often.
        subject: identifies the model, the parameters and the data.
        rate_per: the part of a row that draws a rate: `row`, `document` or `block`. With one rate
            for the row, the curves are functions of it, and `methods` may weight it.
        block_size: tokens in a block; None: the model reads whole rows.
    """

    rows: int
    rates: int
    masks: int
    batch: int
    bins: int
    methods: tuple[str, ...]
    mask_token_id: int
    eps: float
    seed: int
    isad_token_ids: tuple[int, ...] = ()
    subject: str = ""
    rate_per: RateUnit = "row"
    block_size: int | None = None

    @property
    def mask_configs(self) -> list[tuple[MaskKind, int]]:
        """(kind of mask, number of views) to draw; for each kind, single views come first."""
        configs: dict[tuple[MaskKind, int], None] = {("bernoulli", 1): None}
        for name in self.methods:
            method = METHODS[name]
            configs[method.mask, 1] = configs[method.mask, method.views] = None
        return list(configs)

    @property
    def work_per_row(self) -> int:
        """Number of times that the model processes each row, views counted separately."""
        return self.rates * self.masks * sum(views for _, views in self.mask_configs)

    def __post_init__(self) -> None:
        if self.rows < 2 or self.rates < 3 or self.masks < 2:
            raise UserError("needs at least --rows 2, --rates 3 and --masks 2")
        if self.bins < 1:
            raise UserError("--bins must be at least 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must not be negative")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise UserError(f"--methods: there is no {unknown[0]!r}; `all` shows their names")
        views = [METHODS[name].views for name in self.methods]
        if self.batch < 2 or any(self.batch % k for k in views):
            raise UserError(f"--batch {self.batch}: must be a multiple of {max(views, default=2)}")
        if self.rate_per == "block" and self.block_size is None:
            raise UserError("--rate-per block needs a model with blocks, or --block-size")
        if self.rate_per != "row" and self.methods:
            raise UserError(
                f"--rate-per {self.rate_per} goes with --methods none: the table weights one rate "
                "a row"
            )
        if any(METHODS[name].mask == "isad" for name in self.methods) and not self.isad_token_ids:
            raise UserError("the method isad needs --isad-token-ids")


def measure(
    step: Step,
    texts: Sequence[ScoredRow],
    settings: Settings,
    state: State,
    progress: Callable[[int], Any] = lambda rows: None,
    causal: CausalStep | None = None,
) -> None:
    """Measures the rows that `state` does not have yet.

    Args:
        step: computes loss and gradient of the model.
        texts: rows in random order; the first n0 are used.
        settings: settings of the measurement.
        state: earlier measurements; new ones are added and saved, also after an interruption.
        progress: called with the number of rows that the model has processed since the last call.
        causal: computes loss and gradient of the same network as an autoregressive model.

    Raises:
        UserError: there are fewer texts than rows, or a loss or gradient is not finite.
    """
    if len(texts) < settings.rows:
        raise UserError(
            f"the data has {len(texts)} whole rows and --rows asks for {settings.rows}: add data "
            "or lower --rows"
        )
    try:
        progress(len(state.rows) * settings.work_per_row)
        for number in range(len(state.rows), settings.rows):
            row = _nested(step, texts[number], settings, number, progress)
            if causal is not None:
                loss, gradient = causal(texts[number])
                row |= {"causal loss": np.array([loss]), "causal gradient": gradient.numpy()}
            state.add(row)
    finally:
        state.save()


def _nested(
    step: Step,
    text: ScoredRow,
    settings: Settings,
    number: int,
    progress: Callable[[int], Any],
) -> Row:
    """Measures all draws of one row; rates are independent, and equal for all mask configs.

    Returns:
        `t` and `weight` [nt]; for rates of parts of the row, `t` is their mean. For each kind of
        mask and number of views, with a prefix (`_column_prefix`): `loss`, `norm2` (squared norm of
        the gradient) and `masked` (fraction of masked tokens) [nt, nm]. For single views also
        `hidden`, the norm of the gradient with respect to the final hidden states [nt, nm], and
        `mean`, the mean of the gradient over masks [nt, d].
    """
    quantiles = Quantiles("iid", settings.seed, Split.TEST)
    cells = [number * settings.rates + i for i in range(settings.rates)]
    segments = _rate_segments(text, settings)
    sampler: RateSampler = nested_sampler(settings.eps)
    if segments is None:
        quantile = torch.tensor([quantiles(cell) for cell in cells])
        t, weight = sampler(to_unit(quantile))
    else:
        drawn = [_rates_of_parts(sampler, quantiles, cell, segments) for cell in cells]
        quantile = torch.stack([rates for rates, _ in drawn])
        weight = torch.stack([weight for _, weight in drawn])
        t, sampler = to_unit(quantile[:, : int(segments.max()) + 1]).mean(dim=1), Uniform()
    row: Row = {}
    for mask, views in settings.mask_configs:
        corrupter = corrupter_of(
            Method(mask=mask),
            sampler,
            settings.mask_token_id,
            settings.eps,
            settings.isad_token_ids,
        )
        tokens, able = text.tokens.expand(views, -1), text.eligible.expand(views, -1)
        shape = (settings.rates, settings.masks)
        loss, norm2, hidden, masked = np.zeros((4, *shape))
        means = []
        for i, cell in enumerate(cells):
            total = torch.zeros(())
            for k in range(settings.masks):
                draw = cell * settings.masks + k
                u = row_uniforms(settings.seed, Split.TEST, draw, len(text.tokens))
                grids = torch.from_numpy(
                    np.stack([view_uniforms(u, v, views) for v in range(views)])
                )
                of_views = quantile[i].expand(views, *quantile[i].shape)
                within = None if segments is None else segments.expand(views, -1)
                corruption = corrupter(tokens, able, grids, of_views, within)
                # The loss without the weight of the rate, which is stored in its own column.
                weight_given_t = corruption.weight / to_positions(corruption.rate_weight, within)
                corruption = dataclasses.replace(corruption, weight=weight_given_t)
                loss[i, k], gradient, hidden[i, k] = step(text, corruption)
                norm2[i, k] = float(gradient.double().square().sum())
                if not math.isfinite(loss[i, k] + norm2[i, k]):
                    raise UserError(
                        f"the loss or the gradient of row {number} is NaN or infinite: check the "
                        "model and its precision"
                    )
                masked[i, k] = float(corruption.mask.double().mean())
                total = total + gradient
                progress(views)
            means.append(total.numpy() / settings.masks)
        prefix = _column_prefix(mask, views)
        row |= {f"{prefix} loss": loss, f"{prefix} norm2": norm2, f"{prefix} masked": masked}
        if views == 1:
            row |= {f"{prefix} hidden": hidden, f"{prefix} mean": np.stack(means)}
    return row | {"t": t.numpy(), "weight": weight.numpy()}


def _rates_of_parts(
    sampler: RateSampler, quantiles: Quantiles, cell: int, segments: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws rates of the parts of a row, all uniform but one, which has the density of `sampler`.

    That one is chosen at random, so that the rates have the joint density mean_k q(t_k), and the
    weight is 1 over it. Uniform rates alone would meet the tail of 1/p(t) too seldom.

    Args:
        sampler: the density q.
        quantiles: where the random numbers come from.
        cell: number of the draw.
        segments: the parts, int64 [L].

    Returns:
        Rates as grid integers, int64 [L], of which the first ones belong to parts, and the weight,
        a float64 scalar.
    """
    length, parts = len(segments), int(segments.max()) + 1
    drawn = torch.from_numpy(quantiles.of_documents(cell, length + 1))
    rates, chosen = drawn[:length], int(drawn[length]) * parts >> GRID_BITS
    rate, _ = sampler(to_unit(rates[chosen]))
    rates[chosen] = int(float(rate) * 2**GRID_BITS)
    return rates, 1.0 / sampler.density(to_unit(rates[:parts])).mean()


def _rate_segments(text: ScoredRow, settings: Settings) -> torch.Tensor | None:
    """The parts of a text that have rates of their own, int64 [L]; None: it has one rate."""
    if settings.rate_per == "row":
        return None
    documents = torch.zeros_like(text.tokens) if text.documents is None else text.documents
    if settings.rate_per == "document":
        return documents
    assert settings.block_size is not None  # checked by Settings
    return block_segments(documents[None], settings.block_size)[0]


def _column_prefix(mask: str, views: int) -> str:
    """Prefix of the column names for a kind of mask and a number of views."""
    return f"{mask} x {views}:"


def report(state: State, settings: Settings, texts: Sequence[ScoredRow]) -> dict[str, Any]:
    """Computes the report, ready for JSON.

    Args:
        state: measurements of all rows.
        settings: settings of the measurement.
        texts: as for `measure`.

    Returns:
        `settings`; `length` of the longest row; `documents`: number of documents that the rows come
        from; `loss` and `gradient`: [estimate, standard error] of A, B, C and total for one row;
        `autoregressive`, if measured: C of both, the mean next-token loss and the unigram entropy
        of the rows' tokens, nats; `curves`: means over bins of t, if rows have one rate; `standard
        batch`: variance of a batch of `standard`; `methods`: variances relative to it.
    """
    t, w = state.column("t"), state.column("weight")
    losses = state.column(f"{_column_prefix('bernoulli', 1)} loss")
    loss = NestedDraws.of_draws(t, w, losses[..., None]).centred()
    gradient = _gradient_draws(state, settings, "bernoulli")
    length = max(len(text.tokens) for text in texts[: settings.rows])
    result: dict[str, Any] = {"settings": dataclasses.asdict(settings), "length": length}
    result["documents"] = num_documents(texts[: settings.rows])
    has_curves = settings.rate_per == "row"
    result["curves"] = {}
    if has_curves:
        result["curves"]["mean loss"] = curve(t, losses.mean(axis=2), w, settings.bins)
    for name, nested_draws in (("loss", loss), ("gradient", gradient.centred())):
        result[name] = dataclasses.asdict(decompose(nested_draws, seed=settings.seed))
        parts = (("A", nested_draws.pattern), ("B", nested_draws.rate)) if has_curves else ()
        for letter, part in parts:
            result["curves"][f"{name} {letter}"] = curve(t, part, w, settings.bins)
    if "causal loss" in state.rows[0]:
        counted = torch.cat([text.tokens[text.eligible] for text in texts[: settings.rows]])
        causal = state.column("causal loss")
        result["autoregressive"] = {
            "loss": {"C": between_row_variance(causal, seed=settings.seed)},
            "gradient": {
                "C": between_row_variance(state.column("causal gradient"), seed=settings.seed)
            },
            "mean loss": with_error(
                causal[:, 0] @ resampled(len(causal), 1000, settings.seed) / len(causal),
                len(causal),
            ),
            "unigram entropy": entropy(counted),
        }
    result["methods"] = _methods(state, settings, result, gradient)
    return result


def entropy(tokens: torch.Tensor) -> float:
    """Unigram entropy of token ids, nats: the lowest loss of a model that sees no context."""
    share = torch.unique(tokens, return_counts=True)[1].double() / tokens.numel()
    return float(-(share * share.log()).sum())


def densities(state: State, settings: Settings, length: int) -> FittedDensities:
    """Fits the densities of t for P-POTS to the draws, for each kind of mask.

    As in training, the value of a row is its loss, or the norm of its gradient with respect to the
    final hidden states. Each density is fitted to draws with the kind of mask that it is used with.
    For Bernoulli masks these include the noise of the number of masked tokens.

    Args:
        state: measurements of all rows.
        settings: settings of the measurement.
        length: length of a row.
    """
    found: FittedDensities = {}
    asked_for = (METHODS[name].target for name in settings.methods)
    targets: set[Target] = {target for target in asked_for if target is not None}
    for mask in {mask for mask, _ in settings.mask_configs}:
        for target in sorted(targets):
            column = {"loss": "loss", "gradient": "hidden"}[target]
            values = state.column(f"{_column_prefix(mask, 1)} {column}")
            moments = RateMoments(min(FIT_BINS, max(2, values.size // 20)))
            t, w = (np.repeat(state.column(x), settings.masks) for x in ("t", "weight"))
            moments.update(t, values, w)
            eps = 1 / length if mask == "exact-count" else settings.eps
            found[target, mask] = fit(moments, target=target, eps=eps).sampler()
    return found


def _gradient_draws(state: State, settings: Settings, mask: str) -> NestedDraws:
    prefix = _column_prefix(mask, 1)
    return NestedDraws.of_means(
        state.column("t"),
        state.column("weight"),
        state.column(f"{prefix} mean"),
        state.column(f"{prefix} norm2").mean(axis=2),
        settings.masks,
    )


def _methods(
    state: State, settings: Settings, result: dict[str, Any], gradient: NestedDraws
) -> list[dict[str, Any]]:
    """Computes the table of methods; also adds `standard batch` to `result`."""
    t, w = state.column("t"), state.column("weight")
    single = {"bernoulli": gradient}
    method_draws: dict[tuple[str, MaskKind, int], MethodDraws] = {}
    for mask, views in settings.mask_configs:
        if mask not in single:
            single[mask] = _gradient_draws(state, settings, mask)
        losses, norm2 = (
            state.column(f"{_column_prefix(mask, views)} {x}") for x in ("loss", "norm2")
        )
        method_draws["loss", mask, views] = MethodDraws.of_losses(t, w, losses)
        method_draws["gradient", mask, views] = MethodDraws(single[mask], norm2.mean(axis=2))
        if (mask, views) == ("bernoulli", 1):
            controlled = losses - _binned_mean(t, w, losses)
            method_draws["controlled loss", mask, views] = MethodDraws.of_losses(t, w, controlled)
    found = densities(state, settings, result["length"])
    counts = resampled(settings.rows, 1000, settings.seed)

    def variance(method: Method, what: str) -> Floats:
        texts = settings.batch * method.rows // method.views
        if method.controlled and what == "loss":
            what = "controlled loss"
        source = method_draws[what, method.mask, method.views]
        covariance = bin_covariance(method.quantiles, texts)
        return batch_variance(source, method.sampler(found), covariance, texts, counts)

    standard = {what: variance(METHODS["standard"], what) for what in ("loss", "gradient")}
    result["standard batch"] = {k: with_error(v, settings.rows) for k, v in standard.items()}
    rows = []
    for name in settings.methods:
        method = METHODS[name]
        share = (w * method.sampler(found).density(torch.from_numpy(t)).numpy())[..., None]
        masked = state.column(f"{_column_prefix(method.mask, method.views)} masked")
        fraction = float((share * masked).sum() / (share.sum() * settings.masks))
        ratios = {
            what: with_error(variance(method, what) / standard[what], settings.rows)
            for what in ("gradient", "loss")
        }
        rows.append(
            {
                "method": name,
                "per": method.per,
                "unbiased": method.unbiased,
                **ratios,
                "rows": settings.batch * method.rows,
                "texts": settings.batch * method.rows // method.views,
                "masked_fraction": fraction,
                "head_tokens": fraction * settings.batch * method.rows * result["length"],
            }
        )
    return rows


def _binned_mean(t: Floats, weight: Floats, losses: Floats) -> Floats:
    """Mean loss in the bin of t that contains each rate [n0, nt, 1]."""
    moments = RateMoments(EMA_BINS)
    moments.update(t, losses.mean(axis=2), weight)
    means: Floats = moments.mean()[np.ceil(t * EMA_BINS).astype(int) - 1][..., None]
    return means
