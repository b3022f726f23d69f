"""Does a run with `-m megatron_mdm.pretrain` on one thread, unless its result is kept."""

import itertools
import math
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.race import data, unigram
from benchmarks.race.contenders import CONTENDERS, write_density
from benchmarks.race.judge import Judge
from benchmarks.race.plan import Run, Scale
from benchmarks.race.results import Record
from benchmarks.timing import device_name
from megatron_mdm.errors import UserError
from megatron_mdm.experiments.runs import PROGRAM, run_cached, run_path, run_python

_EVALUATION = re.compile(r" validation NELBO: (\S+) .*? per rate \(t: nats/token\) \| (.*)")
_DIVERGED = re.compile(r"keeps a run from diverging|validation NELBO: (nan|inf)")
_EVALUATED_TOKENS = 8192  # tokens of a micro-batch in an evaluation


class Trainer:
    """Does training runs, and keeps each result as soon as it is there.

    Args:
        scale: the scale of the race.
        directory: directory for data and results.
        device: cpu or cuda.
    """

    def __init__(self, scale: Scale, directory: pathlib.Path, device: str) -> None:
        self.scale = scale
        self.directory = directory
        self.device = device
        self.machine = device_name(device)
        self._lock = threading.Lock()
        self._written: dict[tuple, list[str]] = {}
        self.judge = Judge(self)
        data.write_training(directory)
        write_density(directory)

    def __call__(self, run: Run) -> Record:
        """Does a run, or reads its kept result.

        Raises:
            UserError: the run failed for another reason than divergence.
        """
        flags = self.flags(run)
        # The settings for judging are a part of the run's identity.
        question = [*flags, "judged", str(self.scale.judging)] if run.judged else flags
        name = run_path(self.directory, question)
        kept = run_cached(self.directory, question, lambda path: self._train(run, flags, path))
        return Record(
            run,
            tuple(kept["nelbo"]),
            kept["bins"],
            kept["seconds"],
            kept["program"],
            kept["machine"],
            name.name,
            kept["judged"],
        )

    def flags(self, run: Run) -> list[str]:
        """Returns all flags of a run."""
        model = self.scale.models[run.model]
        evaluated = min(self.scale.held_out, max(1, _EVALUATED_TOKENS // run.length))
        return [
            *f"--mdm-device {self.device} --seed {run.seed} {data.TOKENIZER}".split(),
            *self._data_flags(run),
            *("--data-cache-path", str(self.directory / "cache"), "--num-workers", "0"),
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

    def _data_flags(self, run: Run) -> list[str]:
        directory, length, rows = self.directory, run.length, run.rows * run.steps
        held_out = self.scale.held_out
        if run.data == "unigram":
            return [
                *self._once(unigram.training_flags, directory, length, rows),
                *self._once(unigram.held_out_flags, directory, length, held_out),
            ]
        return [
            *data.training_flags(directory, length * rows),
            *self._once(data.held_out_flags, directory, length, held_out),
        ]

    def _once(self, write: Callable[..., list[str]], *question: Any) -> list[str]:
        """Writes data only once, since runs may be reading them; returns their flags."""
        with self._lock:
            if (write, *question) not in self._written:
                self._written[write, *question] = write(*question)
            return self._written[write, *question]

    def _train(self, run: Run, flags: list[str], path: pathlib.Path) -> dict[str, Any]:
        log = path.with_suffix(".log")
        save = ["--save", str(path), "--save-interval", str(run.steps)] if run.judged else []
        shutil.rmtree(path, ignore_errors=True)  # from an interrupted run
        start = time.monotonic()
        try:
            output = run_python([*PROGRAM, *flags, *save], log, f"the run {run.text()}")
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
        judged = {}
        if run.judged and len(nelbo) == len(run.evaluated):
            judged = self.judge(path, run.length, run.text())
            shutil.rmtree(path)
        return {
            "nelbo": nelbo,
            "bins": _bins(found[len(nelbo) - 1][1]) if nelbo else {},
            "judged": judged,
            "seconds": round(time.monotonic() - start, 1),
            "machine": self.machine,
        }


def _bins(text: str) -> dict[str, float]:
    """Parses `0.05: 3.1416 0.15: ...` from a log."""
    words = text.split()
    return {t.rstrip(":"): float(value) for t, value in zip(words[::2], words[1::2], strict=True)}
