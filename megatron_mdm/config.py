"""The settings of the objective: one dataclass that is also the source of the `--mdm-*` flags.

Megatron's ArgumentGroupFactory turns every field into a flag and the text under it into the flag's
help, which is why annotations here must stay real types (no `from __future__ import annotations`).
A field that is on by default has a flag that turns it off, whose help is its own (`_turned_off`).
The help ends with the default; the text under a field that is None by default says it in words.
"""

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from megatron_mdm.errors import UserError
from megatron_mdm.objective.bell_limits import BELLS, LEAST_PROPOSAL_SHARE, check_bell
from megatron_mdm.objective.ppots.limits import MOST_PPOTS_BINS

# Larger numbers are mistakes, for which there would be no memory.
MOST_RATE_BINS = 10_000
MOST_WINDOW = 2**24


def _turned_off(flag_help: str) -> Any:
    """A field that is on by default, and the help of `--no-mdm-NAME`, which turns it off."""
    return field(default=True, metadata={"argparse_meta": {"help": flag_help}})


@dataclass(frozen=True)
class MDMConfig:
    """The masked-diffusion objective (arXiv 2511.18159 and LLaDA, arXiv 2502.09992)."""

    device: Literal["cuda", "cpu"] = "cuda"
    """Device to train on. `cpu` runs the same program over gloo, without a GPU."""

    recipe: Literal["standard", "paper", "clipped", "recommended"] | None = None
    """Sets the flags below together: `standard` none of the methods; `paper` P-POTS on the loss and
    MIRROR; `clipped` rates from 0.3 to 0.8, whose loss is no bound; `recommended` what trained
    best, of those that are bounds, at equal compute: P-POTS on the gradient, lattice quantiles and
    exact-count masks. Flags given by hand win. Default: none of them; every flag has its own
    default."""

    mask_token_id: int | None = None
    """Id of the mask token, inside the padded vocabulary. Default: the tokenizer's."""

    vocab_size: int | None = None
    """Rows of the vocabulary that are tokens. Later ones are padding, and take no part in the
    softmax. Default: those of the checkpoint, or else of the tokenizer and the mask token."""

    rate_sampler: Literal["uniform", "clipped", "flat", "logit-normal", "beta", "ppots"] = "uniform"
    """Density q of the masking rate t on (0, 1]; the loss is weighted by 1/q. `ppots` is the
    paper's P-POTS, read from --mdm-ppots-file, fitted while training (--mdm-ppots-refit-interval),
    or both. Others change the objective: `clipped` draws from --mdm-clip without a weight; `flat`
    weighs uniform rates by 2t, so that masked tokens count about alike; `logit-normal` and `beta`
    are bells (--mdm-logit-normal, --mdm-beta), unless --mdm-bell-role says `proposal`."""

    clip: list[float] | None = None
    """The two ends of the rates of the clipped sampler, 0 <= low < high <= 1. Default: none; that
    sampler needs them."""

    logit_normal: list[float] | None = None
    """MEAN and STD of log(t / (1 - t)), for the sampler of this name. Default: none; that sampler
    needs them."""

    beta: list[float] | None = None
    """A and B of the Beta density of t, for the sampler of this name. Default: none; that sampler
    needs them."""

    bell_uniform_share: float = 0.1
    """Share a of the uniform in the density of a bell, w(t) = (1 - a) bell(t) + a, in (0, 1]."""

    bell_role: Literal["objective", "proposal", "weight"] = "objective"
    """`objective`: rates from the density of a bell without a weight, so that the objective is the
    mean loss over it. `weight`: the same objective by uniform rates, weighted by the density.
    `proposal`: rates from the density with weights of one over it, which leaves the objective as it
    is, and needs --mdm-bell-uniform-share 0.1 or more."""

    bell_fade: list[float] | None = None
    """START and END, fractions of the run, 0 <= START <= END <= 1, between which the uniform share
    of a bell rises to 1, linearly: from END on rates are uniform, and the objective is exact. A run
    that goes on for longer than planned keeps the iterations, or samples, that these were. With
    --mdm-ppots-refit-interval P-POTS begins at END. --mdm-bell-role objective only. Default: the
    share stays as it is."""

    ppots_file: str | None = None
    """A density of t made by tools/fit_ppots.py (arXiv 2511.18159); with
    --mdm-ppots-refit-interval the one to start from. Default: none; the run then starts from the
    uniform density."""

    ppots_refit_interval: int = 0
    """Iterations between fits of the density of t to the rows of the run itself; 0: never."""

    ppots_target: Literal["loss", "gradient"] = "loss"
    """What such a fit measures of a row: its `loss`, the paper's, or the norm of the `gradient` of
    its loss at the final hidden states, which is closer to what disturbs training."""

    ppots_bins: int = 30
    """Equal bins of t in which the run measures its rows for P-POTS. With fewer than 7 the paper's
    family, which has as many parameters, is left out of the choice; with fewer than 5 only the
    measured values themselves are left."""

    ppots_uniform_share: float = 0.1
    """Share of the uniform in a density that the run fits, in (0, 1]; one over it bounds the
    importance weight."""

    ppots_decay: float = 0.5
    """What older measurements count for after each fit, in [0, 1]."""

    row_order: Literal["epoch", "run"] | None = None
    """Order of the rows of text. `epoch`: every epoch passes over all of them in an order of its
    own, whatever the length of the run. `run`: Megatron's, which shuffles the epochs of a run
    together, so that another length reorders all rows. Default: `epoch`; a run that resumes keeps
    its order."""

    quantiles: Literal["iid", "strata", "lattice"] = "lattice"
    """Where the quantiles of t come from: `iid` draws; `strata`, StraTS of the paper: stratified
    over windows of --mdm-strata-window rows; `lattice`, a golden-ratio sequence on the row number,
    which stratifies every contiguous window of rows."""

    rate_per: Literal["row", "document"] = "row"
    """What draws a masking rate and counts as one under --mdm-normalization rows: a `row`, or each
    `document` of a packed row, which is then masked, weighted and measured as it would be alone."""

    strata: int | None = None
    """Number of strata in a window. Default: the square root of the window, as the paper's."""

    strata_window: int | None = None
    """Rows over which `strata` stratifies. Default: the global batch size."""

    mask: Literal["bernoulli", "exact-count"] = "bernoulli"
    """`bernoulli`: every eligible token is masked with probability p(t) = (1 - eps) t + eps and
    weighted by 1/p(t). `exact-count`: k = ceil(t L) of the L eligible tokens are masked, weighted
    by L/k; the same objective in the limit eps -> 0, without the noise of the count."""

    views: int = 1
    """Rows made of each text, with the same t and different masks; must divide the micro-batch
    size. 2 is MIRROR of the paper, uniforms u and 1 - u; K turns them: frac(u + j/K). Compare at
    equal rows: K views see a K-th of the texts."""

    isad_token_ids: list[int] | None = None
    """Tokens that ISAD of the paper masks more often. Bernoulli masks only. Default: none."""

    isad_delta: float = 0.1
    """What ISAD adds to the masking probability of its tokens, in [0, 1]."""

    isad_weight: Literal["inclusion", "exact"] = "inclusion"
    """`inclusion` weighs each token by one over its own masking probability, which shifts what the
    others are predicted from; `exact` weighs the row by the likelihood ratio of its mask, which is
    unbiased, and heavy-tailed when many tokens are chosen; it raises p to (1 + p)/2 at most."""

    eps: float = 1e-3
    """Least masking probability, in (0, 1): bounds the weight 1/p(t) of Bernoulli masks. Exact
    counts do not use it: they mask one token or more."""

    normalization: Literal["tokens", "rows"] = "tokens"
    """`tokens`: sum of weighted losses over the global batch / its eligible tokens (pretraining).
    `rows`: mean over rows of the loss per eligible token of the row (LLaDA's fine-tuning)."""

    head: Literal["masked", "full"] = "masked"
    """Where logits and cross entropies are computed: at `masked` positions only, the others being
    no part of the loss, or at all. Both give the same loss and gradients."""

    eod_eligible: bool = _turned_off("Leave end-of-document tokens out of masking and of the loss.")
    """End-of-document tokens take part in masking and in the loss."""

    eod_attended: bool = _turned_off(
        "Hide end-of-document tokens from the attention of all positions."
    )
    """All positions attend to end-of-document tokens."""

    pad_eligible: bool = False
    """Let padding take part in masking and in the loss (LLaDA's fine-tuning pads with EOS so)."""

    pad_attended: bool = _turned_off("Hide padding from the attention of all positions.")
    """All positions attend to padding, as in LLaDA."""

    isolate_documents: bool = False
    """Attention stays inside each document of a packed row, and positions start over with it."""

    random_length_fraction: float = 0.0
    """Fraction of the rows that end early, after a length uniform over 1 to --seq-length (LLaDA:
    0.01), in [0, 1]. What follows is neither attended to nor predicted."""

    sft: bool = False
    """Supervised fine-tuning: rows are pairs of a prompt, which stays visible, and a response, made
    by tools/preprocess_data.py. LLaDA's has --mdm-normalization rows and --mdm-pad-eligible. With
    --mdm-isolate-documents a row holds as many pairs as fit, none of which sees another."""

    pad_response_to_multiple_of: int = 1
    """For the packed pairs of --mdm-sft and --mdm-isolate-documents: every response ends with as
    many end-of-document tokens as make its length a multiple of this, all of them eligible. What
    is visible then tells the length up to the multiple only, so that the model learns to end a text
    before its positions end."""

    syrm_token_ids: list[int] | None = None
    """Tokens of the prompt that SyRM of the paper masks like the response's. This changes the
    objective. Default: none."""

    syrm_fraction: float = 0.0
    """Fraction of the prompt's other tokens that SyRM masks too, in [0, 1]."""

    shift: bool = False
    """The logits of a position predict the token after it, as in Dream and in models that were
    trained autoregressively. The first token of a row is then never masked."""

    anneal_attention_iters: int = 0
    """Iterations in which attention goes from causal to bidirectional, for a model that was trained
    autoregressively; 0: bidirectional from the start. Evaluations are always bidirectional."""

    rate_bins: int = 10
    """Number of equal bins of t in which the logs show the loss."""

    ema_decay: float = 0.9
    """What the moving average of the loss per rate keeps at each log line, in [0, 1]; it is the
    control variate of the `controlled loss` in the logs (EMA of the paper). It cannot change
    training."""

    allow_flag_change: bool = False
    """Resume although objective flags differ from the checkpoint's."""

    checkpoint_hashes: bool = _turned_off(
        "Neither write nor check the SHA-256 of a checkpoint's files (its integrity.json)."
    )
    """A checkpoint has the SHA-256 of its files (integrity.json). A load checks them."""

    overwrite_save: bool = False
    """Start where --load, --ckpt-step and --finetune say, although --save holds checkpoints of
    another run, or later ones. The run saves over them."""

    def __post_init__(self) -> None:
        """Checks every value by itself.

        Raises:
            UserError: a value is out of range; the message names the flag.
        """
        _choice(self, "device", "rate_sampler", "quantiles", "mask")
        _choice(self, "normalization", "isad_weight", "ppots_target", "head")
        _choice(self, "rate_per", "bell_role")
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
            del needs["ppots"]  # it takes over from the bell
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
        if not (len(self.bell_fade) == 2 and 0.0 <= self.bell_fade[0] <= self.bell_fade[1] <= 1.0):
            ends = " ".join(map(str, self.bell_fade))
            raise UserError(f"--mdm-bell-fade takes 0 <= START <= END <= 1, got {ends}")

    def _refuse_idle(self, needed: str, *names: str) -> None:
        """Refuses settings that do nothing without the flag `needed`, which is not given."""
        for name in names:
            if getattr(self, name) != getattr(MDMConfig, name):
                raise UserError(f"{flag_of(name)} needs {needed}: it does nothing without")

    @classmethod
    def from_args(cls, args: Namespace) -> "MDMConfig":
        """Takes the `mdm_*` values out of Megatron's arguments.

        Those of a checkpoint may be older than a flag, whose default then is how it was trained.
        """
        given = {field.name: destination(field.name) for field in fields(cls)}
        return cls(
            **{name: getattr(args, dest) for name, dest in given.items() if hasattr(args, dest)}
        )

    def arguments(self) -> dict[str, Any]:
        """The values by their names among Megatron's arguments."""
        return {destination(name): value for name, value in asdict(self).items()}

    def least_masked_fraction(self, seq_length: int) -> float:
        """Least mean fraction of a row that is masked: eps, or one token of an exact count."""
        return 1.0 / seq_length if self.mask == "exact-count" else self.eps

    @property
    def bell(self) -> tuple[str, list[float]] | None:
        """Name and parameters of the bell that rates come from; None: from none."""
        parameters = {"logit-normal": self.logit_normal, "beta": self.beta}.get(self.rate_sampler)
        return (self.rate_sampler, parameters) if parameters else None

    @property
    def divides_rows(self) -> bool:
        """Whether attention stays inside parts of a row."""
        return self.isolate_documents or self.random_length_fraction > 0.0

    @property
    def attends_everywhere(self) -> bool:
        """Whether every position attends to every other, so that no attention mask is needed."""
        return (
            self.eod_attended
            and self.pad_attended
            and not self.divides_rows
            and not self.anneal_attention_iters
        )


def requested_device() -> str:
    """The value of --mdm-device on the command line, needed before Megatron can be imported.

    Asking for help needs no GPU.
    """
    if _asks_for_help():
        return "cpu"
    return str(_requested("--mdm-device", MDMConfig.device))


def requested_save() -> str | None:
    """The value of --save on the command line, needed before Megatron reads what lies there.

    None also where nothing is saved: with --skip-train or --help.
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
    """The command-line flag of an argument of Megatron's or ours: mdm_eps -> --mdm-eps."""
    return "--" + name.replace("_", "-")


def _choice(config: MDMConfig, *names: str) -> None:
    """Checks fields of Literal type, which a dataclass does not do by itself."""
    for name in names:
        annotation = MDMConfig.__annotations__[name]
        choices = get_args(get_args(annotation)[0]) or get_args(annotation)
        value = getattr(config, name)
        if value not in choices:
            raise UserError(f"{flag_of(name)} must be one of {', '.join(choices)}, got {value!r}")
