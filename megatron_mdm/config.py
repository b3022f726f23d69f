"""The settings of the objective: one dataclass that is also the source of the `--mdm-*` flags.

Megatron's ArgumentGroupFactory makes a flag of every field and takes the text under the field as
the help of the flag. Annotations must therefore be real types (no `from __future__ import
annotations`). A field that is on by default has the flag `--no-mdm-NAME`, which turns it off and
has its own help text (`_turned_off`). The help ends with the default; if the default is None, the
text under the field states it. `python -m megatron_mdm.mcore.flags.page` prints FLAGS.md.
"""

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, get_args

from megatron_mdm.errors import UserError
from megatron_mdm.objective.bell_limits import BELLS, LEAST_PROPOSAL_SHARE, check_bell
from megatron_mdm.objective.block_schedule import BlockSchedule
from megatron_mdm.objective.ppots.limits import MOST_PPOTS_BINS

# Larger numbers are mistakes, and memory would not suffice for them.
MOST_RATE_BINS = 10_000
MOST_WINDOW = 2**24


def _turned_off(flag_help: str) -> Any:
    """A field that is on by default, and the help of `--no-mdm-NAME`, which turns it off."""
    return field(default=True, metadata={"argparse_meta": {"help": flag_help}})


def _shown_as(*values: str) -> dict[str, Any]:
    """The metadata of a field whose values have these names in the help."""
    return {"argparse_meta": {"metavar": values if len(values) > 1 else values[0]}}


@dataclass(frozen=True)
class MDMConfig:
    """The masked-diffusion objective (arXiv 2511.18159 and LLaDA, arXiv 2502.09992)."""

    device: Literal["cuda", "cpu"] = "cuda"
    """Device to train on. `cpu` runs the same program with the gloo backend, without a GPU."""

    recipe: Literal["standard", "paper", "clipped", "ppots", "recommended"] | None = None
    """Sets several flags together: `standard` uses none of the methods; `paper` uses P-POTS, fitted
    to the loss, and MIRROR; `clipped` draws rates from 0.3 to 0.8, so that its loss is no bound on
    the negative log-likelihood; `ppots` uses P-POTS, fitted to the gradient, lattice quantiles and
    exact-count masks; `recommended` draws rates from a bell, which fades between 70% and 90% of the
    run, so that its loss is no bound before, and uses lattice quantiles and exact-count masks. This
    recipe trained best at equal compute among those that end with a bound. Flags on the command
    line win over the recipe. The run prints what its recipe stands for. Default: none; every flag
    has its own default."""

    model: Literal["gpt", "hybrid"] | None = None
    """Megatron's class of the model: `gpt`, GPTModel, or `hybrid`, its successor HybridModel.
    `hybrid` makes --hybrid-layer-pattern from --num-layers, the flags of experts and the layout of
    pipeline stages, and continues checkpoints of either class. Default: `gpt`; `hybrid` with
    --hybrid-layer-pattern."""

    mask_token_id: int | None = None
    """Id of the mask token, at least 0 and below the padded vocabulary size. Default: the mask
    token of the tokenizer."""

    vocab_size: int | None = None
    """Number of rows of the vocabulary that are tokens. The rows after them are padding and take no
    part in the softmax. Default: the number of the checkpoint; without a checkpoint, the number
    that the tokenizer and the mask token need."""

    rate_sampler: Literal["uniform", "clipped", "flat", "logit-normal", "beta", "ppots"] = "uniform"
    """Density q of the masking rate t on (0, 1], and the weight of the loss. `uniform`: weight 1.
    `ppots` is P-POTS of the paper: a fitted density, weight 1/q(t), the same objective. The density
    is read from --mdm-ppots-file, fitted during training (--mdm-ppots-refit-interval), or both. The
    other samplers change the objective. `clipped`: uniform between the ends of --mdm-clip, weight
    1. `flat`: uniform, weight 2t, so that all masked tokens count about alike. `logit-normal` and
    `beta` are bell-shaped densities (--mdm-logit-normal, --mdm-beta), weight 1; with
    --mdm-bell-role proposal their weight is 1/q(t) and the objective stays the same."""

    clip: list[float] | None = field(default=None, metadata=_shown_as("LOW", "HIGH"))
    """Ends of the interval of masking rates of --mdm-rate-sampler clipped, 0 <= LOW < HIGH <= 1.
    Default: none; the sampler `clipped` requires this flag."""

    logit_normal: list[float] | None = field(default=None, metadata=_shown_as("MEAN", "STD"))
    """Mean and standard deviation of log(t / (1 - t)) for --mdm-rate-sampler logit-normal, MEAN in
    [-3, 3] and STD in [0.1, 3]. Default: none; the sampler `logit-normal` requires this flag."""

    beta: list[float] | None = field(default=None, metadata=_shown_as("A", "B"))
    """Parameters of the Beta density of t for --mdm-rate-sampler beta, proportional to t^(A-1)
    (1-t)^(B-1), both in [1, 100]. Default: none; the sampler `beta` requires this flag."""

    bell_uniform_share: float = 0.1
    """Share a of the uniform density in a bell-shaped density, w(t) = (1 - a) bell(t) + a, in (0,
    1]. A share above 0 trains every rate."""

    bell_role: Literal["objective", "proposal", "weight"] = "objective"
    """Role of the bell-shaped density w(t). `objective`: rates are drawn from w and have the weight
    1, so the objective is the mean loss over w. `weight`: the same objective from uniform rates
    with the weight w(t). `proposal`: rates are drawn from w and have the weight 1/w(t), so the
    objective is the one of uniform rates. `proposal` needs --mdm-bell-uniform-share 0.1 or more,
    because its weights go up to one over the share."""

    bell_fade: list[float] | None = field(default=None, metadata=_shown_as("START", "END"))
    """Fractions of the run, 0 <= START <= END < 1, between which the uniform share of a bell rises
    linearly to 1. From END on, which leaves at least the last step, rates are uniform and the
    objective is exact. The run converts both to iterations, or to samples with --train-samples,
    when it begins; a longer run keeps these. With --mdm-ppots-refit-interval, P-POTS takes over at
    END. Needs --mdm-bell-role objective. Default: the share stays constant."""

    ppots_file: str | None = field(default=None, metadata=_shown_as("FILE"))
    """Density of t that tools/fit_ppots.py has fitted, a JSON file. With --mdm-ppots-refit-interval
    the run starts from this density, and a resumed run continues with the density in its
    checkpoint. Without it, a resume with another density needs --mdm-allow-flag-change. Default:
    none; the run then starts from the uniform density."""

    ppots_refit_interval: int = 0
    """Number of iterations between two fits of the density of t to the rows of the run itself, at
    least 0. 0: the run fits no density. Other values need --ckpt-format torch_dist."""

    ppots_target: Literal["loss", "gradient"] = "loss"
    """Quantity of a row that P-POTS measures during training. `loss`: the loss of the row, as in
    the paper. `gradient`: the norm of the gradient of this loss at the final hidden states, which
    is closer to the noise that disturbs training."""

    ppots_bins: int = 30
    """Number of equal bins of t in which the run measures its rows for P-POTS, 1 to 1022. Fewer
    than 7 bins exclude the paper's family EPR, which has 7 parameters, from the choice of a family;
    fewer than 5 bins leave only the measured values themselves."""

    ppots_uniform_share: float = 0.1
    """Share s of the uniform density in a density that the run fits, in (0, 1]. The importance
    weight is at most 1/s."""

    ppots_decay: float = 0.5
    """Factor that multiplies the weight of older measurements after each fit, in [0, 1]."""

    row_order: Literal["epoch", "run"] | None = None
    """Order of the rows of text. `epoch`: every epoch has an order of its own, whatever the length
    of the run. `run`: Megatron's order, which shuffles all epochs of a run together, so that a run
    of another length has another order. Default: `epoch`; a resumed run keeps its order."""

    quantiles: Literal["iid", "strata", "lattice"] = "lattice"
    """Source of the quantiles of t. `iid`: independent draws. `strata` is StraTS of the paper:
    draws that are stratified over windows of --mdm-strata-window rows. `lattice`: the quantile of
    row i is (offset + i * golden ratio) mod 1, which stratifies every contiguous window of rows."""

    rate_per: Literal["row", "document", "block"] | None = None
    """Unit that draws a masking rate: a `row`, each `document` of a packed row, or each `block` of
    --mdm-block-size. The unit is masked, weighted and measured as it would be in a row of its own.
    Documents also count as one under --mdm-normalization rows, and so do the documents of blocks if
    --mdm-isolate-documents is given; a block counts by its share of their tokens. Default: `block`
    with blocks, else `row`."""

    block_size: int | None = field(default=None, metadata=_shown_as("TOKENS"))
    """Number of tokens in a block, at least 1. The tokens of a block are predicted from its visible
    tokens and from the clean tokens of the blocks before it. Blocks count from the first token of
    the row or, with --mdm-isolate-documents, of the document; the last one may be shorter. A row
    then has twice as many positions, noisy and clean. With --transformer-impl transformer_engine it
    needs --bf16 or --fp16. Default: no blocks; tokens are predicted from all visible tokens of the
    row."""

    block_size_schedule: str | None = field(default=None, metadata=_shown_as("SCHEDULE"))
    """Block sizes over the course of the run, as START:SIZE phases that begin after START
    iterations, or samples with --train-samples, for example "0:1 1000:4 2000:32 8000:row". `row` is
    the whole row, at the cost of a run without blocks. A run that resumes may change the phases
    that have not begun. Default: the size of --mdm-block-size."""

    eval_block_sizes: list[str] | None = field(default=None, metadata=_shown_as("SIZE"))
    """Block sizes of evaluations, each a number of tokens or `row` for whole rows. Every evaluation
    takes the same rows at each size, --eval-iters global batches of them, and the log shows each
    size by name, whatever the size that training has. Needs blocks. Default: the size that
    training has at the moment."""

    ar_loss_weight: float = 0.0
    """Weight of a next-token loss on the clean tokens, at least 0, added to the loss of the masked
    tokens. Clean tokens then attend only to those before them. Needs blocks in all of the run. 0:
    clean tokens attend to their whole block, and have no loss."""

    confidence_loss: float = field(default=0.0, metadata=_shown_as("WEIGHT"))
    """Weight of the confidence loss of LLaDA2.0 (CAP), at least 0: the entropy of the prediction of
    each masked token whose prediction is right already. It has the weights and the denominator of
    the loss, and the logs show it apart. It makes predictions certain, so that more tokens can be
    decoded at once. What the run minimises is then no bound. P-POTS on the gradient measures the
    gradient of the sum. Evaluations do not have this loss. 0: off."""

    strata: int | None = field(default=None, metadata=_shown_as("N"))
    """Number of strata in a window, at least 1 and at most the number of texts in the window
    (--mdm-strata-window / --mdm-views). Default: the square root of the number of
    texts in a window, as in the paper."""

    strata_window: int | None = field(default=None, metadata=_shown_as("ROWS"))
    """Number of rows over which --mdm-quantiles strata stratifies, a multiple of --mdm-views.
    Default: the global batch size."""

    mask: Literal["bernoulli", "exact-count"] = "bernoulli"
    """How a row is masked at rate t. `bernoulli`: every eligible token is masked with probability
    p(t) = (1 - eps) t + eps and has the weight 1/p(t). `exact-count`: k = ceil(t L) of the L
    eligible tokens are masked and have the weight L/k. This is the same objective in the limit eps
    -> 0, without the noise of the count."""

    views: int = 1
    """Number of rows that are made of each text, with the same t and different masks; it must
    divide the micro-batch size. 2 is MIRROR of the paper: uniform numbers u and 1 - u. For K > 2,
    view j uses frac(u + j/K). Compare methods at equal rows: K views see a K-th of the texts."""

    isad_token_ids: list[int] | None = field(default=None, metadata=_shown_as("ID"))
    """Ids of the tokens that ISAD of the paper masks more often. Needs --mdm-mask bernoulli.
    Default: none."""

    isad_delta: float = 0.1
    """Amount that ISAD adds to the masking probability of its tokens, in [0, 1]: they are masked
    with probability p_i = min(p + delta, 1)."""

    isad_weight: Literal["inclusion", "exact"] = "inclusion"
    """Weight under ISAD. `inclusion`: each token has the weight 1/p_i, one over its own masking
    probability. This shifts the contexts from which the other tokens are predicted, and so the
    objective. `exact`: every token has the weight 1/p times the likelihood ratio of the mask of the
    row. This weight is unbiased, and heavy-tailed if many tokens are chosen; p_i is then at most (1
    + p)/2."""

    eps: float = 1e-3
    """Smallest masking probability of Bernoulli masks, in (0, 1). It bounds their weight 1/p(t) by
    1/eps. Exact-count masks do not use it, because they mask one token or more."""

    normalization: Literal["tokens", "rows"] = "tokens"
    """How losses are averaged over the global batch. `tokens`: the sum of the weighted losses
    divided by the number of eligible tokens (pretraining). `rows`: the mean over rows of the loss
    per eligible token of the row (LLaDA's fine-tuning)."""

    head: Literal["masked", "full"] = "masked"
    """Positions at which logits and cross entropies are computed: the `masked` positions, which are
    the only ones in the loss, or all positions (`full`). Both give the same loss and gradients.
    Features that need logits of one shape, such as --cuda-graph-impl full_iteration and
    --defer-embedding-wgrad-compute, need `full`."""

    eod_eligible: bool = _turned_off(
        "Exclude end-of-document tokens from masking and from the loss."
    )
    """End-of-document tokens take part in masking and in the loss."""

    eod_attended: bool = _turned_off(
        "Hide end-of-document tokens from the attention of all positions. A position that sees "
        "nothing else sees itself. Needs --transformer-impl local."
    )
    """All positions attend to end-of-document tokens."""

    pad_eligible: bool = False
    """Padding takes part in masking and in the loss. LLaDA's fine-tuning does this with
    end-of-document tokens as padding."""

    pad_attended: bool = _turned_off(
        "Hide padding from the attention of all positions. Needs --transformer-impl local."
    )
    """All positions attend to padding, as in LLaDA."""

    isolate_documents: bool = False
    """Attention stays inside each document of a packed row, and positions start at 0 in each
    document. With --mdm-sft a row holds several pairs."""

    random_length_fraction: float = 0.0
    """Fraction of the rows that end early, in [0, 1] (LLaDA: 0.01). The length of such a row is
    uniform over 1 to --seq-length. The tokens after its end are neither attended to nor
    predicted."""

    sft: bool = False
    """Supervised fine-tuning: rows are pairs of a prompt and a response, made by
    tools/preprocess_data.py. The prompt stays visible. LLaDA's fine-tuning adds --mdm-normalization
    rows and --mdm-pad-eligible. With --mdm-isolate-documents a row holds as many pairs as fit, and
    no pair sees another."""

    pad_response_to_multiple_of: int = 1
    """Appends end-of-document tokens to every response until its length is a multiple of this
    number, at least 1. All of them are eligible. The visible positions then tell the length of a
    response up to the multiple only, so that the model learns to end a text before its positions
    end. Needs the packed pairs of --mdm-sft with --mdm-isolate-documents."""

    syrm_token_ids: list[int] | None = field(default=None, metadata=_shown_as("ID"))
    """Ids of the prompt tokens that SyRM of the paper masks like tokens of the response. This
    changes the objective. Needs --mdm-sft. Default: none."""

    syrm_fraction: float = 0.0
    """Fraction of the other prompt tokens that SyRM masks too, chosen at random, in [0, 1]. Any
    fraction above 0 changes the objective. Needs --mdm-sft."""

    shift: bool = False
    """The logits of a position predict the token after it, as in Dream and in models that were
    trained autoregressively. The first token of a row is then never masked. The clean copy of its
    predecessor predicts the first token of a block."""

    shift_first: Literal["clean", "noisy"] = "clean"
    """Copy of its predecessor that predicts the first token of a block. The block sees the `clean`
    copy. The `noisy` one belongs to the block before; Fast-dLLM v2 trains with it. Needs
    --mdm-shift and blocks."""

    anneal_attention_iters: int = 0
    """Number of iterations during which attention changes from causal to bidirectional, at least 0,
    for a model that was trained autoregressively. 0: attention is bidirectional from the start.
    Evaluations are always bidirectional. Needs --transformer-impl local."""

    embedding_noise: list[float] | None = field(
        default=None, metadata=_shown_as("STD", "ITERATIONS")
    )
    """Adds Gaussian noise to the embeddings of masked tokens, for a model that was trained
    autoregressively and does not know the mask token. Its standard deviation falls from STD to 0 in
    the first ITERATIONS iterations. Evaluations have none. Default: no noise."""

    rate_bins: int = 10
    """Number of equal bins of t in which the logs show the loss, 1 to 10000."""

    ema_decay: float = 0.9
    """Factor by which the moving average of the loss per masking rate keeps its value at each log
    line, in [0, 1]. The average is the control variate of the `controlled loss` in the logs (EMA of
    the paper); 1: no control variate. It cannot change training."""

    allow_flag_change: bool = False
    """Resume although flags of the objective, the data or the tokenizer differ from those of the
    checkpoint."""

    checkpoint_hashes: bool = _turned_off(
        "Neither write nor check the SHA-256 hashes of a checkpoint's files (integrity.json)."
    )
    """A checkpoint holds the SHA-256 hashes of its files (integrity.json), and a load checks
    them."""

    overwrite_save: bool = False
    """Start from the checkpoint that --load, --ckpt-step and --finetune name, although --save holds
    checkpoints of another run, or later ones. The run saves over them."""

    def __post_init__(self) -> None:
        """Checks the values, and the combinations of values that need nothing else.

        Raises:
            UserError: a value is out of range; the message names the flag.
        """
        _choice(self, "device", "rate_sampler", "quantiles", "mask")
        _choice(self, "normalization", "isad_weight", "ppots_target", "head")
        _choice(self, "bell_role", "shift_first")
        if self.rate_per is not None:
            _choice(self, "rate_per")
        if self.row_order is not None:
            _choice(self, "row_order")
        if not 0.0 < self.eps < 1.0:
            raise UserError(f"--mdm-eps must lie in (0, 1), got {self.eps}")
        if not 1 <= self.rate_bins <= MOST_RATE_BINS:
            raise UserError(
                f"--mdm-rate-bins must lie in 1..{MOST_RATE_BINS}, got {self.rate_bins}"
            )
        if self.mask_token_id is not None and self.mask_token_id < 0:
            raise UserError(f"--mdm-mask-token-id must not be negative, got {self.mask_token_id}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UserError(f"--mdm-vocab-size must be at least 1, got {self.vocab_size}")
        self._check_sampler()
        if self.views < 1:
            raise UserError(f"--mdm-views must be at least 1, got {self.views}")
        if not self.isad_token_ids:
            self._refuse_idle("--mdm-isad-token-ids", "isad_delta", "isad_weight")
        if not 0.0 <= self.isad_delta <= 1.0:
            raise UserError(f"--mdm-isad-delta must lie in [0, 1], got {self.isad_delta}")
        if self.isad_token_ids and self.mask != "bernoulli":
            raise UserError("--mdm-isad-token-ids needs --mdm-mask bernoulli")
        if not 0.0 <= self.syrm_fraction <= 1.0:
            raise UserError(f"--mdm-syrm-fraction must lie in [0, 1], got {self.syrm_fraction}")
        for name in ("syrm_token_ids", "syrm_fraction"):
            if getattr(self, name) and not self.sft:
                raise UserError(f"{flag_of(name)} needs --mdm-sft: only these rows have prompts")
        if not 0.0 <= self.random_length_fraction <= 1.0:
            raise UserError(
                "--mdm-random-length-fraction must lie in [0, 1], got "
                f"{self.random_length_fraction}"
            )
        for name in ("random_length_fraction", "anneal_attention_iters"):
            if getattr(self, name) and self.sft:
                raise UserError(
                    f"{flag_of(name)} does not go with --mdm-sft: leave one of them out"
                )
        if self.sft and self.rate_per == "document" and not self.isolate_documents:
            raise UserError(
                "--mdm-rate-per document with --mdm-sft needs --mdm-isolate-documents, which packs "
                "several pairs into a row: it holds one otherwise"
            )
        if self.sft and self.isolate_documents and self.pad_eligible:
            raise UserError(
                "--mdm-pad-eligible does not go with the packed pairs of --mdm-sft and "
                "--mdm-isolate-documents, which have no padding of their own: use "
                "--mdm-pad-response-to-multiple-of"
            )
        self._check_response_multiple()
        self._check_blocks()
        if self.embedding_noise is not None:
            given = self.embedding_noise
            if not (len(given) == 2 and 0.0 < given[0] < float("inf") and given[1] >= 1.0):
                raise UserError(
                    "--mdm-embedding-noise takes a standard deviation above 0 and a number of "
                    f"iterations from 1 on, got {' '.join(map(str, given))}"
                )
        if not 0.0 <= self.confidence_loss < float("inf"):
            raise UserError(
                f"--mdm-confidence-loss takes a weight from 0 on, got {self.confidence_loss}"
            )
        if self.anneal_attention_iters < 0:
            raise UserError(
                f"--mdm-anneal-attention-iters must not be negative: {self.anneal_attention_iters}"
            )
        if not 0.0 <= self.ema_decay <= 1.0:
            raise UserError(f"--mdm-ema-decay must lie in [0, 1]: {self.ema_decay}")
        if self.quantiles != "strata" and (self.strata or self.strata_window):
            raise UserError(
                "--mdm-strata and --mdm-strata-window need --mdm-quantiles strata, "
                f"got --mdm-quantiles {self.quantiles}"
            )
        for name in ("strata", "strata_window"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST_WINDOW:
                raise UserError(f"{flag_of(name)} must lie in 1..{MOST_WINDOW}, got {value}")
        if self.strata and self.strata_window and self.strata > self.strata_window:
            raise UserError(
                f"--mdm-strata {self.strata} exceeds the --mdm-strata-window of "
                f"{self.strata_window} rows: use at most one stratum a row"
            )

    def _check_blocks(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise UserError(f"--mdm-block-size must be at least 1, got {self.block_size}")
        if self.block_size is not None and self.block_size_schedule is not None:
            raise UserError(
                "--mdm-block-size and --mdm-block-size-schedule exclude each other: leave one out"
            )
        for size in self.eval_block_sizes or ():
            if size != "row" and not (size.isdecimal() and int(size)):
                raise UserError(
                    f"--mdm-eval-block-sizes takes numbers of tokens and `row`, got {size}"
                )
        if len(set(self.eval_block_sizes or ())) < len(self.eval_block_sizes or ()):
            raise UserError("--mdm-eval-block-sizes names a size twice: leave one of them out")
        if self.blocks is None:
            names = ("ar_loss_weight", "shift_first", "eval_block_sizes")
            self._refuse_idle("--mdm-block-size", *names)
            if self.rate_per == "block":
                raise UserError("--mdm-rate-per block needs --mdm-block-size")
            return
        if self.ar_loss_weight < 0.0:
            raise UserError(f"--mdm-ar-loss-weight must not be negative: {self.ar_loss_weight}")
        if self.ar_loss_weight and None in self.blocks.sizes:
            raise UserError(
                "--mdm-ar-loss-weight needs clean tokens, which the phase `row` of "
                "--mdm-block-size-schedule does not have: leave one of them out"
            )
        if self.ar_loss_weight and self.shift and self.ppots_target == "gradient":
            raise UserError(
                "--mdm-ppots-target gradient with --mdm-ar-loss-weight and --mdm-shift would "
                "measure the next-token loss too, whose logits predict the first tokens of blocks: "
                "use --mdm-ppots-target loss"
            )
        if self.shift_first == "noisy" and not self.shift:
            raise UserError("--mdm-shift-first noisy needs --mdm-shift: it does nothing without")
        if self.anneal_attention_iters:
            raise UserError(
                "--mdm-anneal-attention-iters does not go with blocks, whose schedule takes its "
                "place: use --mdm-block-size-schedule, which begins causal at block size 1"
            )

    def _check_response_multiple(self) -> None:
        name, multiple = "--mdm-pad-response-to-multiple-of", self.pad_response_to_multiple_of
        if multiple < 1:
            raise UserError(f"{name} must be at least 1, got {multiple}")
        if multiple > 1 and not (self.sft and self.isolate_documents):
            raise UserError(
                f"{name} needs the packed pairs of --mdm-sft and --mdm-isolate-documents; one pair "
                "a row is filled up with its end by --mdm-pad-eligible"
            )
        if multiple > 1 and not self.eod_eligible:
            raise UserError(
                f"{name} pads with ends that are predicted: leave out --no-mdm-eod-eligible"
            )

    def _check_sampler(self) -> None:
        needs: dict[str, dict[str, object]] = {
            "clipped": {"--mdm-clip": self.clip},
            "logit-normal": {"--mdm-logit-normal": self.logit_normal},
            "beta": {"--mdm-beta": self.beta},
            "ppots": {
                "--mdm-ppots-file": self.ppots_file,
                "--mdm-ppots-refit-interval": self.ppots_refit_interval,
            },
        }
        if not self.ppots_refit_interval:
            self._refuse_idle(
                "--mdm-ppots-refit-interval",
                *(f"ppots_{name}" for name in ("target", "bins", "uniform_share", "decay")),
            )
        if self.bell_fade is not None and self.ppots_refit_interval:
            del needs["ppots"]  # P-POTS takes over from the bell
        for sampler, flags in needs.items():
            given = [name for name, value in flags.items() if value]
            if given and self.rate_sampler != sampler:
                raise UserError(f"{given[0]} needs --mdm-rate-sampler {sampler}")
            if not given and self.rate_sampler == sampler:
                raise UserError(f"--mdm-rate-sampler {sampler} needs {' or '.join(flags)}")
        self._check_bell()
        if self.ppots_refit_interval < 0:
            raise UserError(
                f"--mdm-ppots-refit-interval must not be negative: {self.ppots_refit_interval}"
            )
        if not 1 <= self.ppots_bins <= MOST_PPOTS_BINS:
            raise UserError(
                f"--mdm-ppots-bins must lie in 1..{MOST_PPOTS_BINS}, got {self.ppots_bins}"
            )
        if not 0.0 < self.ppots_uniform_share <= 1.0:
            raise UserError(
                f"--mdm-ppots-uniform-share must lie in (0, 1]: {self.ppots_uniform_share}"
            )
        if not 0.0 <= self.ppots_decay <= 1.0:
            raise UserError(f"--mdm-ppots-decay must lie in [0, 1]: {self.ppots_decay}")
        if self.clip is not None and not (
            len(self.clip) == 2 and 0 <= self.clip[0] < self.clip[1] <= 1
        ):
            ends = " ".join(map(str, self.clip))
            raise UserError(f"--mdm-clip takes 0 <= low < high <= 1, got {ends}")

    def _check_bell(self) -> None:
        bell = self.bell
        if bell is None:
            samplers = " or ".join(BELLS)
            names = ("bell_uniform_share", "bell_role", "bell_fade")
            self._refuse_idle(f"--mdm-rate-sampler {samplers}", *names)
            return
        check_bell(*bell)
        share = self.bell_uniform_share
        if not 0.0 < share <= 1.0:
            raise UserError(f"--mdm-bell-uniform-share must lie in (0, 1]: {share}")
        if self.bell_role == "proposal" and share < LEAST_PROPOSAL_SHARE:
            raise UserError(
                f"--mdm-bell-role proposal needs --mdm-bell-uniform-share {LEAST_PROPOSAL_SHARE} "
                f"or more, got {share}: its weights go up to one over the share"
            )
        if self.bell_fade is None:
            return
        if self.bell_role != "objective":
            raise UserError(
                f"--mdm-bell-fade needs --mdm-bell-role objective, got {self.bell_role}: another "
                "role leaves nothing to fade"
            )
        if not (len(self.bell_fade) == 2 and 0.0 <= self.bell_fade[0] <= self.bell_fade[1] < 1.0):
            ends = " ".join(map(str, self.bell_fade))
            raise UserError(f"--mdm-bell-fade takes 0 <= START <= END < 1, got {ends}")

    def _refuse_idle(self, needed: str, *names: str) -> None:
        """Refuses settings that do nothing without the flag `needed`, which is missing."""
        for name in names:
            if getattr(self, name) != getattr(MDMConfig, name):
                raise UserError(f"{flag_of(name)} needs {needed}: it does nothing without")

    @classmethod
    def from_args(cls, args: Namespace) -> "MDMConfig":
        """Takes the `mdm_*` values out of Megatron's arguments.

        The arguments of a checkpoint may be older than a flag. The default of the flag is then the
        value that the checkpoint was trained with.
        """
        given = {field.name: destination(field.name) for field in fields(cls)}
        return cls(
            **{name: getattr(args, dest) for name, dest in given.items() if hasattr(args, dest)}
        )

    def arguments(self) -> dict[str, Any]:
        """The values by their names among Megatron's arguments."""
        return {destination(name): value for name, value in asdict(self).items()}

    def least_masked_fraction(self, seq_length: int) -> float:
        """Smallest mean masked fraction of a row: eps, or one token of an exact count.

        A fit of P-POTS needs a fraction below 1. Blocks of one token get that of blocks of two:
        their token is masked at every rate, so that no density is better than another.
        """
        if self.mask != "exact-count":
            return self.eps
        sizes = self.blocks.sizes if self.blocks and self.rate_unit == "block" else (None,)
        longest = max(seq_length if size is None else min(size, seq_length) for size in sizes)
        return 1.0 / max(longest, 2)

    @property
    def bell(self) -> tuple[str, list[float]] | None:
        """Name and parameters of the bell-shaped density in use; None if there is none."""
        parameters = {"logit-normal": self.logit_normal, "beta": self.beta}.get(self.rate_sampler)
        return (self.rate_sampler, parameters) if parameters else None

    @cached_property
    def blocks(self) -> BlockSchedule | None:
        """Block sizes over the course of the run; None: the run has no blocks."""
        if self.block_size_schedule is not None:
            return BlockSchedule.parse(self.block_size_schedule, "--mdm-block-size-schedule")
        return None if self.block_size is None else BlockSchedule.constant(self.block_size)

    @property
    def evaluated_sizes(self) -> list[int | None]:
        """Block sizes of --mdm-eval-block-sizes, None for whole rows; one None without the flag."""
        return [None if x == "row" else int(x) for x in self.eval_block_sizes or ["row"]]

    @property
    def rate_unit(self) -> Literal["row", "document", "block"]:
        """Unit that draws a masking rate."""
        return self.rate_per or ("row" if self.blocks is None else "block")

    @property
    def divides_rows(self) -> bool:
        """Whether attention stays inside parts of a row."""
        return self.isolate_documents or self.random_length_fraction > 0.0

    @property
    def attends_everywhere(self) -> bool:
        """Whether every position attends to every other, so that no attention mask is needed."""
        return self.blocks is None and self.whole_rows_attend_everywhere

    @property
    def has_whole_rows(self) -> bool:
        """Whether any phase of the run, or any evaluation, has rows without blocks."""
        blocks, evaluated = self.blocks, self.eval_block_sizes
        return blocks is None or None in blocks.sizes or "row" in (evaluated or ())

    @property
    def whole_rows_attend_everywhere(self) -> bool:
        """Whether every position attends to every other in rows without blocks."""
        return (
            self.eod_attended
            and self.pad_attended
            and not self.divides_rows
            and not self.anneal_attention_iters
        )


# The fields by subject: the groups of --help and the sections of FLAGS.md.
SECTIONS = {
    "recipe, device and model": ("recipe", "device", "model"),
    "density of the masking rate": (
        *("rate_sampler", "clip", "logit_normal", "beta", "bell_uniform_share", "bell_role"),
        *("bell_fade", "quantiles", "strata", "strata_window", "rate_per"),
    ),
    "P-POTS": (
        *("ppots_file", "ppots_refit_interval", "ppots_target", "ppots_bins"),
        *("ppots_uniform_share", "ppots_decay"),
    ),
    "masks": ("mask", "eps", "views", "isad_token_ids", "isad_delta", "isad_weight"),
    "block diffusion": (
        *("block_size", "block_size_schedule", "eval_block_sizes", "ar_loss_weight"),
    ),
    "loss and logs": ("normalization", "confidence_loss", "head", "rate_bins", "ema_decay"),
    "rows, documents and padding": (
        *("row_order", "isolate_documents", "random_length_fraction", "eod_eligible"),
        *("eod_attended", "pad_eligible", "pad_attended"),
    ),
    "fine-tuning": ("sft", "pad_response_to_multiple_of", "syrm_token_ids", "syrm_fraction"),
    "vocabulary": ("mask_token_id", "vocab_size"),
    "models that were autoregressive": (
        *("shift", "shift_first", "anneal_attention_iters", "embedding_noise"),
    ),
    "checkpoints": ("allow_flag_change", "checkpoint_hashes", "overwrite_save"),
}


def requested_device() -> str:
    """The value of --mdm-device on the command line, which is needed before Megatron is imported.

    --help needs no GPU.
    """
    if _asks_for_help():
        return "cpu"
    return str(_requested("--mdm-device", MDMConfig.device))


def requested_save() -> str | None:
    """The value of --save on the command line, needed before Megatron reads this directory.

    None also if nothing is saved: with --skip-train or --help.
    """
    if _asks_for_help() or "--skip-train" in sys.argv[1:]:
        return None
    return _requested("--save", None)


def _asks_for_help() -> bool:
    return not {"-h", "--help"}.isdisjoint(sys.argv[1:])


def _requested(name: str, default: str | None) -> str | None:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, default=default, dest="value")
    value: str | None = parser.parse_known_args()[0].value
    return value


def destination(name: str) -> str:
    """The name of a field among Megatron's arguments, and in checkpoints: eps -> mdm_eps."""
    return f"mdm_{name}"


def destinations() -> list[str]:
    """The names of all fields among Megatron's arguments."""
    return [destination(field.name) for field in fields(MDMConfig)]


def flag_of(name: str) -> str:
    """The command-line flag of a field: eps -> --mdm-eps."""
    return flag(destination(name))


def flag(name: str) -> str:
    """The command-line flag of an argument, Megatron's or ours: mdm_eps -> --mdm-eps."""
    return "--" + name.replace("_", "-")


def _choice(config: MDMConfig, *names: str) -> None:
    """Checks fields of Literal type; a dataclass does not check them itself."""
    for name in names:
        annotation = MDMConfig.__annotations__[name]
        choices = get_args(get_args(annotation)[0]) or get_args(annotation)
        value = getattr(config, name)
        if value not in choices:
            raise UserError(f"{flag_of(name)} must be one of {', '.join(choices)}, got {value!r}")
