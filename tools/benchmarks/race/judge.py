"""Judges trained models by more than their NELBO: by losses at extreme rates and written texts.

The texts are judged by an autoregressive model, trained once in a race on the same training files.
"""

import json
import pathlib
import shutil
import threading
from typing import TYPE_CHECKING, Any

from megatron_mdm.experiments.runs import AUTOREGRESSIVE, run_cached, run_path, run_python

if TYPE_CHECKING:
    from benchmarks.race.training import Trainer

TOOLS = pathlib.Path(__file__).parents[2]
BINS = 10  # bins of the rate: the outer ones are below 0.1 and above 0.9
TEXTS = ("-m", "benchmarks.race.texts")
# `random` samples from the model: decoding passes through all rates from 1 to 0. `low-confidence`,
# the usual setting, fills in probable tokens first, which does not give a sample from the model.
REMASKING = ("random", "low-confidence")
_SEED = 1  # seed of masks and texts


class Judge:
    """Judges checkpoints; trains the autoregressive judge for the first one.

    Args:
        trainer: the trainer of the race.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self._lock = threading.Lock()
        self._written: set[pathlib.Path] = set()  # files that other threads may be reading

    def __call__(self, checkpoint: pathlib.Path, length: int, name: str) -> dict[str, Any]:
        """Judges the checkpoint of a run.

        Args:
            checkpoint: directory of the checkpoint; this function writes files with the same name
                and further suffixes.
            length: tokens of a row.
            name: name of the run for error messages.

        Returns:
            `nelbo`, and `below 0.1` and `above 0.9` for the losses at these rates: each
            {value, stderr}, in nats per token on the held-out rows. `held out` for held-out rows,
            and the names of REMASKING for written rows: each {nll, stderr, distinct}, see
            `texts.read`.
        """
        sizes = self.trainer.scale.judging
        held_out = self.trainer.directory / f"held_out_{length}"
        files = {x: checkpoint.with_suffix(f".{x}.npy") for x in REMASKING}
        measured, read = (checkpoint.with_suffix(f".{x}") for x in ("measured", "read"))
        log = checkpoint.with_suffix(".judge.log")
        load = ["--device", self.trainer.device, "--load"]
        evaluate = [str(TOOLS / "evaluate.py"), *load, str(checkpoint), "--data", str(held_out)]
        evaluate += f"--rows {self.trainer.scale.held_out} --bins {BINS}".split()
        evaluate += f"--draws {sizes.draws} --seed {_SEED} --batch-size 64 --json".split()
        run_python([*evaluate, str(measured)], log, f"the evaluation of {name}")
        for remasking, file in files.items():
            words = f"--rows {sizes.texts} --steps {sizes.calls} --remasking {remasking}".split()
            words += ["--seed", str(_SEED), "--output", str(file), *load, str(checkpoint)]
            run_python([*TEXTS, "write", *words], log, f"the texts of {name}")
        given = self._held_out_rows(held_out, length, sizes.texts)
        words = [*map(str, files.values()), str(given), "--json", str(read)]
        words += [*load, str(self._trained(length))]
        run_python([*TEXTS, "read", "--rows", *words], log, f"the judge of {name}")
        bins, texts = (json.loads(x.read_text(encoding="utf-8")) for x in (measured, read))
        for path in (measured, read, *files.values()):
            path.unlink()
        return {
            "nelbo": _estimate(bins["nelbo"]),
            "below 0.1": _estimate(bins["bins"][0]),
            "above 0.9": _estimate(bins["bins"][-1]),
            "held out": texts[str(given)],
            **{remasking: texts[str(file)] for remasking, file in files.items()},
        }

    def _trained(self, length: int) -> pathlib.Path:
        """Returns the judge's checkpoint; trains it if needed, while other threads wait."""
        sizes = self.trainer.scale.judging
        more = {"length": length, "flags": ("--mdm-shift",)}
        run = sizes.judge.run("judge", "standard", sizes.lr, 1, **more)
        flags = self.trainer.flags(run)
        question = [*AUTOREGRESSIVE, *flags]
        checkpoint = run_path(self.trainer.directory, question)

        def work(path: pathlib.Path) -> dict[str, Any]:
            shutil.rmtree(path, ignore_errors=True)
            save = ["--save", str(path), "--save-interval", str(run.steps)]
            run_python([*question, *save], path.with_suffix(".log"), "the run of the judge")
            return {}

        with self._lock:
            if not (checkpoint / "latest_checkpointed_iteration.txt").exists():
                checkpoint.with_suffix(".json").unlink(missing_ok=True)
            run_cached(self.trainer.directory, question, work)
        return checkpoint

    def _held_out_rows(self, prefix: pathlib.Path, length: int, num: int) -> pathlib.Path:
        """Writes some held-out rows, at equal distances, to a file for the judge."""
        import numpy as np

        path = prefix.with_suffix(f".{num}.npy")
        with self._lock:
            if path not in self._written:
                rows = np.fromfile(prefix.with_suffix(".bin"), np.uint16).reshape(-1, length)
                np.save(path, rows[:: len(rows) // num][:num].astype(np.int64))
                self._written.add(path)
        return path


def _estimate(found: dict[str, Any]) -> dict[str, float]:
    return {name: found[name] for name in ("value", "stderr")}
