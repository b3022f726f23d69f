"""The state of the objective while it trains: one object, created at the start of the program.

objective.py passes it to the functions that Megatron calls. No part of it is global, so one process
can train one objective after another. Megatron saves no part of it as an argument or a setting.
"""

from argparse import Namespace
from dataclasses import replace

from megatron_mdm.config import MDMConfig
from megatron_mdm.densities import fixed_sampler
from megatron_mdm.mcore.data.validation_sets import part_of_set
from megatron_mdm.mcore.flags.schedule import samples_that_acted
from megatron_mdm.mcore.training.corrupters import evaluation_corrupter, training_corrupter
from megatron_mdm.mcore.training.metrics import Recorder, TrainingClock
from megatron_mdm.mcore.training.ppots import OnlineSampler
from megatron_mdm.mcore.training.throughput import WorkRecorder
from megatron_mdm.objective.bells import Bell, faded_share
from megatron_mdm.objective.control_variate import ControlVariate, bin_masses
from megatron_mdm.objective.corruption import Corrupter
from megatron_mdm.objective.randomness import Split
from megatron_mdm.objective.samplers import RateSampler, Uniform, count_weight
from megatron_mdm.objective.types import Floats
from megatron_mdm.sizing.flops import ModelShape


class TrainingState:
    """The settings of a run, and its state while it trains.

    Args:
        args: Megatron's arguments, as `finalize_args` returns them. The state keeps a reference,
            because Megatron changes the values behind the properties below while it trains.
        eod_id: token that ends a document; None if the tokenizer has none.

    Attributes:
        mdm: settings of the objective.
        eod_id: token that ends a document; None: the tokenizer has none, and no flag needs one.
        seq_length: tokens in a row.
        seed: seed of the run.
        evaluated: name of each evaluated part of the data, by part number.
        world_size: number of ranks. On a machine with GPUs each rank has one.
        checks_finite: whether a loss that is not finite ends the run.
        log_interval: iterations between log lines.
        text_offset: number that is added to the number of a text, row // views.
        sampler_state_in_checkpoint, log_state_in_checkpoint: whether the checkpoint that the run
            resumes holds that state.
        sampler: the P-POTS sampler that is refitted during training; None if no flag asks for it.
        control_variate: control variate of the reported training loss.
        clock: measures seconds of training.
        work: counts operations of training; None without --log-throughput.
        exchanges_positions: whether pipeline stages exchange the positions of rows with blocks (see
            `schedules_positions`).
    """

    def __init__(self, args: Namespace, eod_id: int) -> None:
        self._args = args
        self.mdm = MDMConfig.from_args(args)
        self.eod_id = eod_id
        self.seq_length: int = args.seq_length
        self.seed: int = args.seed
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
        # The density changes while the run trains.
        corrupter = training_corrupter(self.mdm, lambda quantile: self.rate_sampler(quantile))
        self._corrupters = evaluation_corrupter(self.mdm), corrupter
        self._block_corrupter = replace(
            corrupter, count_weight=lambda k, n: count_weight(self.rate_sampler, k, n)
        )
        sets: list[str] = args.mdm_validation_sets or []
        names = [f"validation {name}" for name in sets]
        if self.mdm.eval_block_sizes is not None:
            sizes = [f"block {x}" if x else "whole rows" for x in self.mdm.evaluated_sizes]
            names = [f"{name} {x}" for x in sizes for name in names or ["validation"]]
            names += [f"test {x}" for x in sizes]
        self.evaluated: dict[int, str] = {Split.VALID: "validation", Split.TEST: "test"}
        self.evaluated |= {part_of_set(i): name for i, name in enumerate(names)}
        # A mean over validation sets makes sense at one block size only.
        has_mean = bool(sets) and self.mdm.eval_block_sizes is None
        evaluations = Recorder(self.mdm.rate_bins, len(names), has_mean)
        self._recorders = evaluations, Recorder(self.mdm.rate_bins)
        self._evaluated_batches = 0
        self.control_variate = ControlVariate(self.mdm.rate_bins, self.mdm.ema_decay)
        self.clock = TrainingClock()
        self.exchanges_positions = False
        self.work: WorkRecorder | None = None
        if args.log_throughput:
            self.work = WorkRecorder(ModelShape.from_args(args))

    @property
    def uniform_share(self) -> float:
        """Share of the uniform density beside a bell in the current iteration; 1: no bell.

        It depends only on the number of finished iterations, or of finished samples, so it is the
        same in every layout.
        """
        if self._bell_fade_at is None:
            return 1.0 if self.mdm.bell is None else self.mdm.bell_uniform_share
        start, end, unit = self._bell_fade_at
        finished = self.training_iteration - 1 if unit == "iters" else self.consumed_rows
        return faded_share(self.mdm.bell_uniform_share, start, end, finished)

    @property
    def fitting_sampler(self) -> OnlineSampler | None:
        """`sampler`, or None as long as a bell has not faded out: P-POTS measures only then."""
        return self.sampler if self.uniform_share == 1.0 else None

    @property
    def rate_sampler(self) -> RateSampler:
        """The density from which the rates of the current iteration are drawn."""
        fitting, fixed = self.fitting_sampler, self._fixed_sampler
        if fitting is not None:
            return fitting.state.sampler
        assert fixed is not None
        return fixed.with_share(self.uniform_share) if isinstance(fixed, Bell) else fixed

    def objective_masses(self, uniform_share: float) -> Floats:
        """Mass of the objective in each rate bin [rate_bins]; see `bin_masses`.

        Args:
            uniform_share: mean uniform share over the draws. A mean suffices because the masses are
                linear in the share.
        """
        fixed = self._fixed_sampler or Uniform()  # P-POTS leaves the objective as it is
        sampler = fixed.with_share(uniform_share) if isinstance(fixed, Bell) else fixed
        return bin_masses(sampler, self.mdm.rate_bins)

    def corrupter(self, training: bool) -> Corrupter:
        """The corrupter that masks the rows of training, or of evaluations.

        In blocks an exact count has the importance weight of the count. Whole rows keep that of the
        rate, which is nearly the same there.
        """
        if training and self.mdm.mask == "exact-count" and self.block_size(training) is not None:
            return self._block_corrupter
        return self._corrupters[training]

    def recorder(self, training: bool) -> Recorder:
        """The statistics of training, or of evaluations."""
        return self._recorders[training]

    def micro_batch_size(self, training: bool) -> int:
        """Rows in a micro-batch of training, or of evaluations."""
        return self._micro_batch_sizes[training]

    def attention_annealing(self, training: bool) -> float:
        """Progress from causal attention (0) to full attention (1); evaluations always have 1."""
        iterations = self.mdm.anneal_attention_iters
        return (self.training_iteration - 1) / iterations if training and iterations else 1.0

    def embedding_noise(self, training: bool) -> float:
        """Standard deviation of the noise on the embeddings of masked tokens; 0: no noise."""
        if self.mdm.embedding_noise is None or not training:
            return 0.0
        std, iterations = self.mdm.embedding_noise
        return std * max(0.0, 1.0 - (self.training_iteration - 1) / iterations)

    def block_size(self, training: bool) -> int | None:
        """Tokens in a block in the current iteration; None: whole rows.

        Evaluations have the block sizes of --mdm-eval-block-sizes, one after another. Without that
        flag they have the block size of the last iteration that has trained the weights.
        """
        blocks = self.mdm.blocks
        if blocks is None:
            return None
        if self.mdm.eval_block_sizes is not None and not training:
            sizes, batches = self.mdm.evaluated_sizes, self._args.eval_iters
            return sizes[(self._evaluated_batches - 1) % batches * len(sizes) // batches]
        by_rows = self._args.train_samples is not None
        if training:
            return blocks.size(self.consumed_rows if by_rows else self.training_iteration - 1)
        acted = samples_that_acted(self._args, self.consumed_rows) if by_rows else self.iteration
        return blocks.last_size(acted)

    def begin_evaluation_batch(self) -> None:
        """Counts the global batches of evaluations, from which their block sizes follow."""
        self._evaluated_batches += 1

    def copies(self, training: bool) -> tuple[int, int]:
        """(positions of a token in a row of the model, rows of the batch that share this row)."""
        if self.block_size(training) is None:
            return 1, 1
        views = self.mdm.views if training else 1
        return views + 1, views

    @property
    def only_evaluates(self) -> bool:
        """Whether the run has --skip-train."""
        return self._args.skip_train

    @property
    def has_begun(self) -> bool:
        """Whether the first iteration has begun. Checkpoints are loaded before it."""
        return hasattr(self._args, "curr_iteration")

    @property
    def training_iteration(self) -> int:
        """Number of the current iteration during a training step; the first is 1."""
        return self._args.curr_iteration + 1  # Megatron counts from 0

    @property
    def iteration(self) -> int:
        """Number of the last iteration that has trained the weights, for evaluations.

        It is the checkpoint's iteration if the run trains nothing: with --skip-train, or if the
        training was already complete.
        """
        args = self._args
        trains = not args.skip_train and args.iteration < (args.train_iters or 0)
        return self.training_iteration if trains else args.iteration

    @property
    def consumed_rows(self) -> int:
        """Rows of all finished iterations, over all data-parallel ranks."""
        return self._args.consumed_train_samples
