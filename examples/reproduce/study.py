"""The runs of the study: data, pretraining, fine-tuning. Each runs once, in its own processes."""

import collections
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from methods import METHODS, TASKS, Run, Scale, Setting, calibration_runs, gate, is_measured
from problems import Problem, distinct
from score import from_hex

from megatron_mdm.config import flag_of
from megatron_mdm.errors import UserError
from megatron_mdm.experiments.runs import (
    AUTOREGRESSIVE,
    PROGRAM,
    as_flags,
    digest,
    iteration_in,
    run_cached,
    run_path,
    run_python,
)
from megatron_mdm.files import write_text

HERE = pathlib.Path(__file__).parent
TOOLS = HERE.parents[1] / "tools"
EVALUATED = 100  # rows of a validation batch
SFT = {"sft": True, "pad_eligible": True, "normalization": "rows"}


@dataclass
class Study:
    """The runs of one scale in one directory, on one device.

    Data and checkpoints are named by a digest of their inputs, so that runs with the same flags
    share data and base model. A thread that needs a result which another thread is computing waits
    for it.
    """

    scale: Scale
    directory: pathlib.Path
    device: str

    def __post_init__(self) -> None:
        self._locks: dict[Any, threading.RLock] = collections.defaultdict(threading.RLock)
        self._data: dict[str, pathlib.Path] = {}
        self._unseen: dict[tuple[str, str], list[bool]] = {}
        self._first_lock = threading.Lock()
        # Log of each running process -> name of its run and start time.
        self._running: dict[pathlib.Path, tuple[str, float]] = {}

    def data(self, task: str) -> pathlib.Path:
        """Returns the directory of a task's problems, tokenizer and data; makes missing ones."""
        with self._lock("data", task):
            if task not in self._data:
                self._data[task] = self._make_data(task)
            return self._data[task]

    def _make_data(self, task: str) -> pathlib.Path:
        scale, kind = self.scale, TASKS[task]
        found = {"test": distinct(kind.pair, scale.tests, 3)}
        out = {problem.prompt for problem in found["test"]}
        found["valid"] = distinct(kind.pair, scale.held_out, 4, out)
        out |= {problem.prompt for problem in found["valid"]}
        found["text"] = distinct(kind.text, scale.texts, 1, out)
        out |= {problem.prompt for problem in found["text"]}
        pairs = distinct(kind.pair, max(scale.pairs.values()), 2, out)
        found |= {regime: pairs[:count] for regime, count in scale.pairs.items()}
        texts = {name: as_json(name, some) for name, some in found.items()}
        self._unseen |= {
            (task, regime): unseen(found["test"], found["text"], found[regime])
            for regime in scale.pairs
        }
        directory = self.directory / f"{task}-{digest(json.dumps(texts))}"
        for name, text in texts.items():
            path = directory / f"{name}.jsonl"
            if not path.exists():
                write_text(str(path), text)
        model = directory / "words.model"
        commands = [
            [
                *("train_tokenizer.py", "--input", f"{directory}/text.jsonl"),
                *("--output", str(model), "--vocab-size", "448"),
            ],
            *(
                [
                    *("preprocess_data.py", "--input", f"{directory}/{name}.jsonl"),
                    *("--tokenizer-model", str(model), "--output-prefix", f"{directory}/{name}"),
                    *(() if name == "text" else PAIR_KEYS),
                ]
                for name in found
                if name != "test"
            ),
        ]
        for tool, *flags in commands:
            self._run([str(TOOLS / tool), *flags, "--unless-done"], directory / "data.log", tool)
        return directory

    def pretrain(self, task: str, base: int, causal: bool) -> pathlib.Path:
        """Trains a base model, if that was not done; returns the directory of its checkpoint."""
        scale = self.scale
        steps = scale.causal_pretraining if causal else scale.pretraining
        method = METHODS["autoregressive" if causal else "standard"]
        flags = [
            *self._flags(task, steps, 2 * scale.batch, 3e-3, 1000 + base),
            *self._data_flags(task, "text", "text"),
            *self.method_flags(task, method.settings),
        ]
        path = run_path(self.directory, flags)
        checkpoint = path.with_suffix(".checkpoint")
        name = f"{'autoregressive ' if causal else ''}base {base} of {task}"

        def work(path: pathlib.Path) -> dict[str, Any]:
            result = self._train(path, flags, steps, causal, name)
            if "diverged" in result:
                raise UserError(f"{name}: {result['diverged']}")
            return result

        with self._lock(path):
            if not (checkpoint / LATEST).exists():
                # The cached result is useless without its checkpoint.
                path.with_suffix(".json").unlink(missing_ok=True)
            run_cached(self.directory, flags, work)
        return checkpoint

    def steps(self, run: Run) -> int:
        """Returns the number of optimizer steps of a fine-tuning."""
        if METHODS[run.method].stopped:
            return int(self.stopped(run.setting)["steps"])
        return self.scale.steps[run.setting.task]

    def batch(self, run: Run) -> int:
        """Returns the number of rows in a step."""
        return self.scale.batch * METHODS[run.method].rows

    def fine_tuning(self, run: Run, steps: int, base: pathlib.Path) -> list[str]:
        """Returns the flags of a run that starts from a checkpoint."""
        task, regime, _ = run.setting
        return [
            *self._flags(task, steps, self.batch(run), 1e-3, run.seed),
            *self._data_flags(task, regime, "valid"),
            *self.method_flags(task, SFT),
            *("--load", str(base), "--finetune", "--exit-on-missing-checkpoint"),
            *self.method_flags(task, METHODS[run.method].settings),
        ]

    def fine_tune(self, run: Run, steps: int | None = None) -> dict[str, Any]:
        """Trains and scores a run, unless that was done; measures noise in some `standard` runs.

        Args:
            run: the run.
            steps: optimizer steps, if not the run's own number.

        Returns:
            The results; for a run that diverged, only `diverged`, a line that says so.
        """
        (task, _, base), causal = run.setting, METHODS[run.method].causal
        steps = self.steps(run) if steps is None else steps
        flags = self.fine_tuning(run, steps, self.pretrain(task, base, causal))
        score = [str(HERE / "score.py"), "--problems", f"{self.data(task)}/test.jsonl"]
        score += ["--causal"] if causal else ["--threshold", "0.9"]
        measured = is_measured(self.scale, run)
        noise, report = self._noise(run.setting), self._report(run)
        name = f"{run.setting.title}: {run.method}, seed {run.seed}, {steps} steps"

        def work(path: pathlib.Path) -> dict[str, Any]:
            start = time.monotonic()
            result = self._train(path, flags, steps, causal, name, saves=2 if measured else 1)
            if "diverged" in result:
                print(f"{name}: {result['diverged']}", file=sys.stderr, flush=True)
                return result
            checkpoint = path.with_suffix(".checkpoint")
            result |= self._tool(path, score, checkpoint, f"score: {name}")
            if measured:
                start_of_it = path.with_name(f"{path.name}-start")
                self._train(start_of_it, [*flags, *STANDSTILL], 1, causal, f"start: {name}")
                middle = path.with_suffix(".middle")
                at_iteration(checkpoint, steps // 2, middle)
                places = {
                    "start": start_of_it.with_suffix(".checkpoint"),
                    "middle": middle,
                    "end": checkpoint,
                }
                result["moments"] = {
                    moment: self._tool(path, noise, place, f"noise: {name}")
                    | self._tool(path, report, place, f"report: {name}")
                    for moment, place in places.items()
                }
                for place in (places["start"], middle):
                    shutil.rmtree(place)
            shutil.rmtree(checkpoint)
            print(
                f"{name}: {result['answers']:.1%} of the answers, {result['nelbo']:.4f} nats/token",
                file=sys.stderr,
                flush=True,
            )
            rows, views = self.batch(run) * steps, METHODS[run.method].views
            size = {"steps": steps, "rows": rows, "texts": rows // views}
            return result | size | {"seconds": time.monotonic() - start}

        identity = [*flags, *score[1:], *(noise[1:] + report[1:] if measured else [])]
        with self._lock(run_path(self.directory, identity)):
            result = run_cached(self.directory, identity, work)
        if "diverged" in result:
            return result
        return result | self._unseen_answers(run.setting, result) | {"flags": " ".join(flags)}

    def _unseen_answers(self, setting: Setting, result: dict[str, Any]) -> dict[str, Any]:
        """Counts the problems whose response is in no training text, and those of them solved."""
        self.data(setting.task)
        kept = self._unseen[setting.task, setting.regime]
        right = list(itertools.compress(from_hex(result["right"], len(kept)), kept))
        return {"unseen": len(right), "unseen_right": sum(right)}

    def stopped(self, setting: Setting) -> dict[str, Any]:
        """Finds the steps after which the autoregressive network solves as much as `standard`.

        Returns:
            `steps`; `target`, the mean share of right answers of `standard`; `reached`, the
            interpolated share of the autoregressive network after these steps; `slopes`, the change
            of both shares with 25% more steps; `lengths`, pairs of steps and the autoregressive
            network's share.

        Raises:
            UserError: all runs of one length diverged.
        """
        found: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
        for run, steps in calibration_runs(self.scale, setting):
            result, answers = self.fine_tune(run, steps), found[run.method, steps]
            if "diverged" not in result:
                answers.append(result["answers"])
        for (method, steps), answers in found.items():
            if not answers:
                raise UserError(
                    f"{setting.title}: every run of {method} with {steps} steps diverged, so "
                    "nothing tells where the autoregressive network solves as much as `standard`"
                )
        means = {key: statistics.fmean(answers) for key, answers in found.items()}
        standard, lengths = (
            {steps: mean for (name, steps), mean in means.items() if name == method}
            for method in ("standard", "autoregressive")
        )
        target, more = standard.values()
        steps, reached, slope = where_reached(target, lengths)
        return {
            "steps": steps,
            "target": target,
            "reached": reached,
            "slopes": {"standard": more - target, "autoregressive": slope},
            "lengths": list(lengths.items()),
        }

    def accepts(self, setting: Setting) -> bool:
        """Whether the share that a setting's first run of `standard` solves is within the limits.

        Trains the run if it is missing.
        """
        if self.scale.accepts is None:
            return True
        least, most = self.scale.accepts
        answers: float = self.fine_tune(gate(setting)).get("answers", 0.0)
        return least <= answers <= most

    def _noise(self, setting: Setting) -> list[str]:
        """Returns the command that measures the gradients of all methods at one checkpoint."""
        methods = {
            name: {
                "batch": self.scale.batch * method.rows,
                **self._with_ids(setting.task, method.settings),
            }
            for name in self.scale.entries.get(setting, {})
            if (method := METHODS[name]).is_steady
        }
        command = [str(HERE / "noise.py"), "--batches", str(self.scale.gradients)]
        return [*command, "--methods", json.dumps(methods)]

    def _report(self, run: Run) -> list[str]:
        """Returns the command that measures A, B and C of one row's variance at a checkpoint."""
        data = f"{self.data(run.setting.task)}/{run.setting.regime}"
        words = f"--rows {self.scale.nested} --methods none --seed {run.seed}"
        return [str(TOOLS / "variance_report.py"), "--data", data, *words.split()]

    def _tool(
        self, path: pathlib.Path, command: list[str], checkpoint: pathlib.Path, name: str
    ) -> dict[str, Any]:
        """Runs a tool on a checkpoint and returns its results."""
        tool = pathlib.Path(command[0]).stem
        found = path.with_name(f"{path.name}.{tool}.json")
        output = "--output" if tool == "variance_report" else "--json"
        figure = found.with_suffix(".png")
        places = ["--load", str(checkpoint), "--device", self.device, output, str(found)]
        places += ["--figure", str(figure)] if tool == "variance_report" else []
        # A partial report of an earlier checkpoint, from before an interruption, would be refused.
        found.with_name(f"{found.name}.partial").unlink(missing_ok=True)
        self._run([*command, *places], found.with_suffix(".log"), name)
        result: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
        found.unlink()
        figure.unlink(missing_ok=True)
        if tool == "variance_report":
            return {what: result[what] for what in ("loss", "gradient")}
        return result

    def _run(self, command: list[str], log: pathlib.Path, name: str) -> str:
        """Calls `run_python`; `progress` shows the process meanwhile."""
        self._running[log] = name, time.monotonic()
        try:
            return run_python(command, log, name)
        finally:
            del self._running[log]

    def progress(self, least: float) -> list[str]:
        """Returns a line for each process that has run for some time: its run, progress and log.

        Args:
            least: smallest running time in seconds.
        """
        now = time.monotonic()
        return [
            f"   {name}: {now - start:.0f} s, {iteration_in(log) or 'running'} (log: {log})"
            for log, (name, start) in list(self._running.items())
            if now - start >= least
        ]

    def _train(
        self,
        path: pathlib.Path,
        flags: list[str],
        steps: int,
        causal: bool,
        name: str,
        saves: int = 1,
    ) -> dict[str, Any]:
        """Trains a run; its checkpoints are beside `path`, `saves` of them. Returns the NELBO."""
        board, checkpoint = (path.with_suffix(end) for end in (".tensorboard", ".checkpoint"))
        for old in (board, checkpoint):
            shutil.rmtree(old, ignore_errors=True)
        program = AUTOREGRESSIVE if causal else PROGRAM
        places = ["--save", str(checkpoint), "--save-interval", str(max(1, steps // saves))]
        places += ["--tensorboard-dir", str(board)]
        log = path.with_suffix(".log")
        try:
            output = self._run([*program, *flags, *places], log, name)
        except UserError:
            # The run diverged. It would diverge again, so this is its result.
            if not NOT_FINITE.search(log.read_text(encoding="utf-8")):
                raise
            shutil.rmtree(checkpoint, ignore_errors=True)
            return {"diverged": "its loss or gradient was NaN or infinite"}
        values = re.findall(r"validation NELBO: ([\d.]+)|lm loss value: ([\dE.+-]+)", output)
        if not values:
            raise UserError(f"{name} ended without a validation: its output is in {log}")
        return {"nelbo": float(values[-1][0] or values[-1][1])}

    def _flags(self, task: str, steps: int, batch: int, lr: float, seed: int) -> list[str]:
        scale, length = self.scale, TASKS[task].length
        words = f"{self.data(task)}/words.model"
        return [
            *f"--mdm-device {self.device} --transformer-impl local".split(),
            # On a GPU a small model trains faster than one process loads rows.
            *f"--num-workers {0 if self.device == 'cpu' else 4}".split(),
            # By default Megatron needs Transformer Engine or apex for these.
            *"--attention-backend unfused --no-masked-softmax-fusion --no-rope-fusion".split(),
            "--no-persist-layer-norm",
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", words),
            *("--data-cache-path", f"{self.data(task)}/cache"),
            *"--make-vocab-size-divisible-by 64".split(),
            *f"--num-layers {scale.layers} --hidden-size {scale.hidden}".split(),
            *f"--num-attention-heads {scale.heads}".split(),
            *f"--ffn-hidden-size {scale.hidden * 8 // 3} --normalization RMSNorm --swiglu".split(),
            # With Megatron's default of 0.02 a narrow model stays on the initial plateau for long.
            *f"--init-method-std {1 / math.sqrt(scale.hidden):.3g}".split(),
            *"--disable-bias-linear --position-embedding-type rope --attention-dropout 0".split(),
            *f"--hidden-dropout 0 --seq-length {length} --max-position-embeddings {length}".split(),
            *f"--micro-batch-size {batch} --global-batch-size {batch}".split(),
            *f"--train-iters {steps} --lr-warmup-iters {steps // 20}".split(),
            *f"--lr {lr} --min-lr {lr / 10} --lr-decay-style cosine --clip-grad 1.0".split(),
            *f"--weight-decay 0.1 --seed {seed}".split(),
            *f"--eval-interval {steps} --eval-iters {-(-scale.held_out // EVALUATED)}".split(),
            *f"--eval-global-batch-size {EVALUATED} --eval-micro-batch-size {EVALUATED}".split(),
            *f"--log-interval {max(1, steps // 20)}".split(),
        ]

    def _data_flags(self, task: str, train: str, valid: str) -> list[str]:
        data = self.data(task)
        return ["--train-data-path", f"{data}/{train}", "--valid-data-path", f"{data}/{valid}"]

    def method_flags(self, task: str, settings: Mapping[str, Any]) -> list[str]:
        """Returns settings of the objective as flags, with token ids in place of words."""
        found = []
        for name, value in self._with_ids(task, settings).items():
            found += [flag_of(name)] if value is True else as_flags({name: value})
        return found

    def _with_ids(self, task: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        import sentencepiece

        words = sentencepiece.SentencePieceProcessor(model_file=f"{self.data(task)}/words.model")
        return {
            name: [words.piece_to_id(f"\u2581{word}") for word in value]
            if name.endswith("token_ids")
            else value
            for name, value in settings.items()
        }

    def _lock(self, *name: Any) -> threading.RLock:
        with self._first_lock:
            return self._locks[name]


LATEST = "latest_checkpointed_iteration.txt"
# The error messages of a run that diverged: this package's and Megatron's.
NOT_FINITE = re.compile(r"NaN or infinite|found (NaN|Inf)")
PAIR_KEYS = ("--prompt-key", "prompt")
# A run of one step that leaves the weights unchanged: it saves the base model with a run's
# settings.
STANDSTILL = "--train-iters 1 --lr 0 --min-lr 0 --lr-warmup-iters 0 --eval-interval 1".split()


def at_iteration(checkpoint: pathlib.Path, iteration: int, view: pathlib.Path) -> None:
    """Makes a directory of links whose latest checkpoint is an earlier saved iteration."""
    shutil.rmtree(view, ignore_errors=True)
    view.mkdir()
    for entry in checkpoint.iterdir():
        os.symlink(entry.resolve(), view / entry.name)
    (view / LATEST).unlink()
    (view / LATEST).write_text(str(iteration))


def where_reached(target: float, shares: Mapping[int, float]) -> tuple[int, float, float]:
    """Finds the steps at which a share first reaches a target, by log-linear interpolation.

    Args:
        target: the share to reach.
        shares: number of steps, ascending -> share of the runs with these steps.

    Returns:
        The steps, the share there, and its rise with 25% more steps. If already the smallest
        number of steps reaches the target, that number; if none does, the largest.
    """
    points = list(shares.items())
    pairs = list(itertools.pairwise(points))
    (fewer, below), (more, above) = next(
        (pair for pair in pairs if max(pair[0][1], pair[1][1]) >= target), pairs[-1]
    )
    slope = (above - below) / math.log(more / fewer)
    part = 0.0 if below >= target else 1.0
    if below < target < above:
        part = (target - below) / (above - below)
    steps = round(fewer * (more / fewer) ** part)
    return steps, below + part * (above - below), slope * math.log(1.25)


def unseen(tests: list[Problem], *trained: list[Problem]) -> list[bool]:
    """Returns, for each test, whether no training problem has the same response."""
    seen = {problem.response for problems in trained for problem in problems}
    return [problem.response not in seen for problem in tests]


def as_json(name: str, found: list[Problem]) -> str:
    """Writes problems as JSONL: texts for pretraining (if `name` is "text"), or pairs."""
    if name == "text":
        lines = [{"text": f" {p.prompt} {p.response}"} for p in found]
    else:
        lines = [{"prompt": f" {p.prompt}", "response": f" {p.response}"} for p in found]
    return "".join(json.dumps(line) + "\n" for line in lines)
