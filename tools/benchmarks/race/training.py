"""Trains a run through `-m megatron_mdm.pretrain` on one thread, or finds it finished."""

import itertools
import math
import pathlib
import re
import threading
import time
from typing import Any

from benchmarks.race import data
from benchmarks.race.contenders import CONTENDERS, write_density
from benchmarks.race.plan import Run, Scale
from benchmarks.race.results import Record
from benchmarks.timing import device_name
from megatron_mdm.errors import UserError
from megatron_mdm.experiments.runs import PROGRAM, run_cached, run_path, run_python

_EVALUATION = re.compile(r" validation NELBO: (\S+) .*? per rate \(t: nats/token\) \| (.*)")
_DIVERGED = re.compile(r"keeps a run from diverging|validation NELBO: (nan|inf)")
_EVALUATED_TOKENS = 8192  # of a micro-batch


class Trainer:
    """Trains runs, and keeps each result at once.

    Args:
        scale: of the race.
        directory: for data and results.
        device: cpu or cuda.
    """

    def __init__(self, scale: Scale, directory: pathlib.Path, device: str) -> None:
        self.scale = scale
        self.directory = directory
        self.device = device
        self.machine = device_name(device)
        self._lock = threading.Lock()
        self._held_out: dict[int, list[str]] = {}
        data.write_training(directory)
        write_density(directory)

    def __call__(self, run: Run) -> Record:
        """The result of a run.

        Raises:
            UserError: it failed, other than by diverging.
        """
        flags = self.flags(run)
        name = run_path(self.directory, flags)
        kept = run_cached(self.directory, flags, lambda path: self._train(run, flags, path))
        return Record(
            run,
            tuple(kept["nelbo"]),
            kept["bins"],
            kept["seconds"],
            kept["program"],
            kept["machine"],
            name.name,
        )

    def flags(self, run: Run) -> list[str]:
        """All flags of a run."""
        model = self.scale.models[run.model]
        evaluated = min(self.scale.held_out, max(1, _EVALUATED_TOKENS // run.length))
        return [
            *f"--mdm-device {self.device} --seed {run.seed} {data.TOKENIZER}".split(),
            *data.training_flags(self.directory, run.length * run.rows * run.steps),
            *self._held_out_flags(run.length),
            *f"--data-cache-path {self.directory / 'cache'} --num-workers 0".split(),
            *f"--num-layers {model.layers} --hidden-size {model.width}".split(),
            *f"--num-attention-heads {model.heads} --ffn-hidden-size {4 * model.width}".split(),
            *f"--init-method-std {model.init_std:.4g} --normalization RMSNorm --swiglu".split(),
            *"--disable-bias-linear --position-embedding-type rope".split(),
            *f"--seq-length {run.length} --max-position-embeddings {run.length}".split(),
            *"--attention-dropout 0 --hidden-dropout 0 --weight-decay 0.1".split(),
            *f"--micro-batch-size {run.rows} --global-batch-size {run.rows}".split(),
            *f"--train-iters {run.steps} --lr {run.lr:g} --min-lr 0".split(),
            *f"--lr-decay-style cosine --lr-warmup-iters {run.steps // 20}".split(),
            *"--adam-beta2 0.99 --clip-grad 0 --log-interval 50".split(),
            *f"--eval-interval {run.interval} --eval-micro-batch-size {evaluated}".split(),
            *f"--eval-iters {self.scale.held_out // evaluated}".split(),
            *f"--eval-global-batch-size {evaluated}".split(),
            *CONTENDERS[run.contender].flags(self.directory),
            *run.flags,
        ]

    def _held_out_flags(self, length: int) -> list[str]:
        with self._lock:
            if length not in self._held_out:
                rows = self.scale.held_out
                self._held_out[length] = data.held_out_flags(self.directory, length, rows)
            return self._held_out[length]

    def _train(self, run: Run, flags: list[str], path: pathlib.Path) -> dict[str, Any]:
        log = path.with_suffix(".log")
        start = time.monotonic()
        try:
            output = run_python([*PROGRAM, *flags], log, f"the run {run.text()}")
        except UserError:
            output = log.read_text(encoding="utf-8")
            if not _DIVERGED.search(output):
                raise
        found = _EVALUATION.findall(output)
        values = [float(value) for value, _ in found]
        nelbo = list(itertools.takewhile(math.isfinite, values))
        if not _DIVERGED.search(output) and len(nelbo) != len(run.evaluated):
            raise UserError(
                f"the run {run.text()} has {len(nelbo)} evaluations instead of "
                f"{len(run.evaluated)}: its log is {log}"
            )
        return {
            "nelbo": nelbo,
            "bins": _bins(found[len(nelbo) - 1][1]) if nelbo else {},
            "seconds": round(time.monotonic() - start, 1),
            "machine": self.machine,
        }


def _bins(text: str) -> dict[str, float]:
    """From `0.05: 3.1416 0.15: ...` of a log."""
    words = text.split()
    return {t.rstrip(":"): float(value) for t, value in zip(words[::2], words[1::2], strict=True)}
