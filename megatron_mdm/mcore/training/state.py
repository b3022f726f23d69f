"""What the objective keeps while it trains: one object, made where the program starts.

Megatron's callables get it as an argument (objective.py). None of it is global, so one process can
train one objective after another, and none of it is an argument or a setting that Megatron saves.
"""

from argparse import Namespace

from megatron_mdm.config import MDMConfig
from megatron_mdm.densities import fixed_sampler
from megatron_mdm.mcore.data.validation_sets import part_of_set
from megatron_mdm.mcore.training.corrupters import evaluation_corrupter, training_corrupter
from megatron_mdm.mcore.training.metrics import Recorder, TrainingClock
from megatron_mdm.mcore.training.ppots import OnlineSampler
from megatron_mdm.mcore.training.throughput import WorkRecorder
from megatron_mdm.objective.bells import Bell, faded_share
from megatron_mdm.objective.control_variate import ControlVariate, bin_masses
from megatron_mdm.objective.corruption import Corrupter
from megatron_mdm.objective.randomness import Split
from megatron_mdm.objective.samplers import RateSampler, Uniform
from megatron_mdm.objective.types import Floats
from megatron_mdm.sizing.flops import ModelShape


class TrainingState:
    """The settings of a run, and what changes while it trains.

    Args:
        args: Megatron's arguments, as `finalize_args` leaves them. The state keeps them for the
            properties below, whose values Megatron changes while it trains.
        eod_id: token that ends a document; None if the tokenizer has none.

    Attributes:
        mdm: settings of the objective.
        eod_id: token that ends a document; None: the tokenizer has none, and no flag needs one.
        seq_length: tokens in a row.
        evaluated: names of what is evaluated, by its number among the parts of the data.
        world_size: ranks of the run, each of which has a GPU where there are some.
        checks_finite: whether a loss that is not finite ends the run.
        log_interval: iterations between lines of the log.
        text_offset: what is added to the number of a text, row // views.
        sampler_state_in_checkpoint, log_state_in_checkpoint: whether the checkpoint that the run
            resumes holds such a state.
        sampler: P-POTS that is refitted while the run trains; None if no flag asks for it.
        control_variate: of the reported training loss.
        clock: seconds of training.
        work: operations of training, with --log-throughput.
    """

    def __init__(self, args: Namespace, eod_id: int) -> None:
        self._args = args
        self.mdm = MDMConfig.from_args(args)
        self.eod_id = eod_id
        self.seq_length: int = args.seq_length
        self.world_size: int = args.world_size
        self._micro_batch_sizes = args.eval_micro_batch_size, args.micro_batch_size
        self.checks_finite: bool = args.check_for_nan_in_loss_and_grad
        self.log_interval: int = args.log_interval
        self.text_offset: int = args.mdm_text_offset
        self.sampler_state_in_checkpoint: bool = args.mdm_sampler_state_in_checkpoint
        self.log_state_in_checkpoint: bool = args.mdm_log_state_in_checkpoint
        refits = bool(self.mdm.ppots_refit_interval)
        self.sampler = OnlineSampler(self.mdm, self.seq_length) if refits else None
        is_fitted = refits and self.mdm.bell is None
        self._fixed_sampler = None if is_fitted else fixed_sampler(self.mdm)
        self._bell_fade_at: list | None = args.mdm_bell_fade_at
        corrupter = training_corrupter(self.mdm, lambda quantile: self.rate_sampler(quantile))
        self._corrupters = evaluation_corrupter(self.mdm), corrupter
        sets: list[str] = args.mdm_validation_sets or []
        self.evaluated: dict[int, str] = {Split.VALID: "validation", Split.TEST: "test"}
        self.evaluated |= {part_of_set(i): f"validation {name}" for i, name in enumerate(sets)}
        self._recorders = Recorder(self.mdm.rate_bins, len(sets)), Recorder(self.mdm.rate_bins)
        self.control_variate = ControlVariate(self.mdm.rate_bins, self.mdm.ema_decay)
        self.clock = TrainingClock()
        self.work: WorkRecorder | None = None
        if args.log_throughput:
            self.work = WorkRecorder(ModelShape.from_args(args))

    @property
    def uniform_share(self) -> float:
        """Share of the uniform density beside a bell, in the iteration that is trained; 1: no bell.

        A function of the iterations, or the samples, that are finished: every layout has the same.
        """
        if self._bell_fade_at is None:
            return 1.0 if self.mdm.bell is None else self.mdm.bell_uniform_share
        start, end, unit = self._bell_fade_at
        finished = self.training_iteration - 1 if unit == "iters" else self.consumed_rows
        return faded_share(self.mdm.bell_uniform_share, start, end, finished)

    @property
    def fitting_sampler(self) -> OnlineSampler | None:
        """`sampler` in the iterations that it has a part in: none before a bell has faded out."""
        return self.sampler if self.uniform_share == 1.0 else None

    @property
    def rate_sampler(self) -> RateSampler:
        """Where the rates of the iteration that is trained come from."""
        fitting, fixed = self.fitting_sampler, self._fixed_sampler
        if fitting is not None:
            return fitting.state.sampler
        assert fixed is not None
        return fixed.with_share(self.uniform_share) if isinstance(fixed, Bell) else fixed

    def objective_masses(self, uniform_share: float) -> Floats:
        """Mass of the objective in each rate bin [rate_bins]; see `bin_masses`.

        Args:
            uniform_share: mean over draws; masses are linear in it.
        """
        fixed = self._fixed_sampler or Uniform()  # P-POTS leaves the objective as it is
        sampler = fixed.with_share(uniform_share) if isinstance(fixed, Bell) else fixed
        return bin_masses(sampler, self.mdm.rate_bins)

    def corrupter(self, training: bool) -> Corrupter:
        """What masks the rows of training, or of evaluations."""
        return self._corrupters[training]

    def recorder(self, training: bool) -> Recorder:
        """The statistics of training, or of evaluations."""
        return self._recorders[training]

    def micro_batch_size(self, training: bool) -> int:
        """Rows in a micro-batch of training, or of evaluations."""
        return self._micro_batch_sizes[training]

    def attention_annealing(self, training: bool) -> float:
        """Progress from causal attention, 0, to full attention, 1, which evaluations have."""
        iterations = self.mdm.anneal_attention_iters
        return (self.training_iteration - 1) / iterations if training and iterations else 1.0

    @property
    def only_evaluates(self) -> bool:
        """Whether the run is one of --skip-train."""
        return self._args.skip_train

    @property
    def has_begun(self) -> bool:
        """Whether the first iteration has begun: what is loaded is loaded before."""
        return hasattr(self._args, "curr_iteration")

    @property
    def training_iteration(self) -> int:
        """Number of the iteration that is trained, inside a step; the first is 1."""
        return self._args.curr_iteration + 1  # Megatron counts from 0

    @property
    def iteration(self) -> int:
        """Number of the last iteration that has trained the weights, for evaluations.

        That of the checkpoint in a run that trains none: with --skip-train, or finished before.
        """
        args = self._args
        trains = not args.skip_train and args.iteration < (args.train_iters or 0)
        return self.training_iteration if trains else args.iteration

    @property
    def consumed_rows(self) -> int:
        """Rows of the iterations that are finished, over all data-parallel ranks."""
        return self._args.consumed_train_samples
