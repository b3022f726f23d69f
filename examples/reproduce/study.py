"""The runs of the study, each in processes of its own and kept: data, pretraining, fine-tuning."""

import collections
import functools
import json
import pathlib
import re
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from methods import ALL, Scale, Task, tasks
from problems import Problem, problems

from megatron_mdm.config import flag_of
from megatron_mdm.errors import UserError
from megatron_mdm.experiments.runs import (
    AUTOREGRESSIVE,
    PROGRAM,
    as_flags,
    digest,
    run_cached,
    run_path,
    run_python,
)
from megatron_mdm.files import write_text

HERE = pathlib.Path(__file__).parent
TOOLS = HERE.parents[1] / "tools"
LENGTH = 40  # no problem is longer
EVALUATED = 32  # rows of a validation batch


@dataclass
class Study:
    """One scale in one directory, on one device.

    Data and checkpoints are named by what they follow from, so that a run whose flags are the same
    has the same data and the same base.
    """

    scale: Scale
    directory: pathlib.Path
    device: str

    def __post_init__(self) -> None:
        self._locks: dict[tuple[int, bool], threading.Lock] = collections.defaultdict(
            threading.Lock
        )

    @functools.cached_property
    def data(self) -> pathlib.Path:
        """Where problems, tokenizer and datasets are; makes those that are not of this program."""
        scale = self.scale
        tests = problems(scale.tests, (2, 3), 3)
        solved = {problem.prompt for problem in tests}
        found = {
            "text": problems(scale.texts, (1, 2, 3), 1, solved),
            "pairs": problems(scale.pairs, (2, 3), 2, solved),
            "test": tests,
        }
        texts = {name: as_json(name, some) for name, some in found.items()}
        directory = self.directory / f"data-{digest(json.dumps(texts))}"
        for name, text in texts.items():
            path = directory / f"{name}.jsonl"
            if not path.exists():
                write_text(str(path), text)
        model = directory / "words.model"
        commands = [
            f"train_tokenizer.py --input {directory}/text.jsonl --output {model} --vocab-size 448",
            *(
                f"preprocess_data.py --input {directory}/{name}.jsonl --tokenizer-model {model} "
                f"--output-prefix {directory}/{name} {keys}"
                for name, keys in (("text", ""), ("pairs", "--prompt-key prompt"))
            ),
        ]
        for command in commands:
            tool, *flags = command.split()
            run_python([str(TOOLS / tool), *flags, "--unless-done"], directory / "data.log", tool)
        return directory

    def pretrain(self, seed: int, causal: bool) -> pathlib.Path:
        """Trains the base of a seed on running text, once: the directory of its checkpoint.

        Who asks for one that is being trained in another thread waits for it.
        """
        scale = self.scale
        method = ALL["autoregressive" if causal else "recommended"]
        flags = [
            *self._flags(scale.pretraining, 2 * scale.batch, 3e-3, seed),
            *f"--data-path {self.data}/text --split 98,2,0".split(),
            *self.method_flags(method.settings),
        ]
        path = run_path(self.directory, flags)
        checkpoint = path.with_suffix(".checkpoint")

        def work(path: pathlib.Path) -> dict[str, Any]:
            kind = "autoregressive" if causal else "diffusion"
            return self._train(path, flags, scale.pretraining, causal, f"{kind} base, seed {seed}")

        with self._locks[seed, causal]:
            if not (checkpoint / "latest_checkpointed_iteration.txt").exists():
                path.with_suffix(".json").unlink(missing_ok=True)  # good for its checkpoint alone
            run_cached(self.directory, flags, work)
        return checkpoint

    def fine_tuning(self, task: Task, base: pathlib.Path) -> list[str]:
        """The flags of a run that starts from a checkpoint."""
        steps, batch = task.steps(self.scale), task.batch(self.scale)
        return [
            *self._flags(steps, batch, 1e-3, task.seed),
            *f"--data-path {self.data}/pairs --split 90,10,0".split(),
            *"--mdm-sft --mdm-pad-eligible --mdm-normalization rows".split(),
            *f"--load {base} --finetune --exit-on-missing-checkpoint".split(),
            *self.method_flags(ALL[task.method].settings),
        ]

    def fine_tune(self, task: Task) -> dict[str, Any]:
        """Trains and scores one run, unless that was done; measures gradients after `standard`."""
        causal = ALL[task.method].causal
        steps, batch = task.steps(self.scale), task.batch(self.scale)
        flags = self.fine_tuning(task, self.pretrain(task.seed, causal))
        score = [str(HERE / "score.py"), "--problems", f"{self.data}/test.jsonl"]
        score += ["--causal"] if causal else []
        commands = {"score": score}
        if task.method == "standard":
            commands["noise"] = self._noise()
        name = f"{task.method}, seed {task.seed}, {batch} rows a step"

        def work(path: pathlib.Path) -> dict[str, Any]:
            result = self._train(path, flags, steps, causal, name)
            checkpoint = path.with_suffix(".checkpoint")
            for kind, command in commands.items():
                found = path.with_suffix(f".{kind}")
                places = f"--load {checkpoint} --json {found} --device {self.device}".split()
                run_python([*command, *places], path.with_suffix(f".{kind}.log"), f"{kind}: {name}")
                result |= json.loads(found.read_text(encoding="utf-8"))
                found.unlink()
            shutil.rmtree(checkpoint)
            print(
                f"{name}: {result['answers']:.1%} of the answers, {result['nelbo']:.4f} nats/token",
                file=sys.stderr,
                flush=True,
            )
            return result | {"rows": batch * steps}

        start = time.monotonic()
        identity = [*flags, *(word for command in commands.values() for word in command[1:])]
        result = run_cached(
            self.directory,
            identity,
            lambda path: work(path) | {"seconds": time.monotonic() - start},
        )
        return result | {"flags": " ".join(flags)}

    def _noise(self) -> list[str]:
        """The command that measures the gradients of all methods at one checkpoint."""
        methods = {}
        for task in tasks(self.scale):
            method = ALL[task.method]
            if method.causal or task.seed != self.scale.seeds[0] or method.steps != 1.0:
                continue
            batch = task.batch(self.scale)
            settings = self._with_ids(method.settings)
            methods[task.entry] = {"batch": batch, **settings}
        command = [str(HERE / "noise.py"), "--batches", str(self.scale.gradients)]
        return [*command, "--methods", json.dumps(methods)]

    def _train(
        self, path: pathlib.Path, flags: list[str], steps: int, causal: bool, name: str
    ) -> dict[str, Any]:
        """Trains to a checkpoint beside `path`: the final NELBO, and where the curves are."""
        board, checkpoint = (path.with_suffix(x) for x in (".tensorboard", ".checkpoint"))
        for old in (board, checkpoint):
            shutil.rmtree(old, ignore_errors=True)
        program = AUTOREGRESSIVE if causal else PROGRAM
        places = f"--tensorboard-dir {board} --save {checkpoint} --save-interval {steps}".split()
        log = path.with_suffix(".log")
        output = run_python([*program, *flags, *places], log, name)
        values = re.findall(r"validation NELBO: ([\d.]+)|lm loss value: ([\dE.+-]+)", output)
        if not values:
            raise UserError(f"{name} ended without a validation: its output is in {log}")
        return {"nelbo": float(values[-1][0] or values[-1][1]), "tensorboard": str(board)}

    def _flags(self, steps: int, batch: int, lr: float, seed: int) -> list[str]:
        scale = self.scale
        return [
            *f"--mdm-device {self.device} --transformer-impl local".split(),
            # A small model takes rows from a GPU's host faster than one process makes them.
            *f"--num-workers {0 if self.device == 'cpu' else 4}".split(),
            # What Megatron takes from Transformer Engine or apex unless it is told not to.
            *"--attention-backend unfused --no-masked-softmax-fusion --no-rope-fusion".split(),
            "--no-persist-layer-norm",
            *f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {self.data}/words.model "
            f"--data-cache-path {self.data}/cache --make-vocab-size-divisible-by 64".split(),
            *f"--num-layers {scale.layers} --hidden-size {scale.hidden}".split(),
            *f"--num-attention-heads {scale.heads}".split(),
            *f"--ffn-hidden-size {scale.hidden * 8 // 3} --normalization RMSNorm --swiglu".split(),
            *"--disable-bias-linear --position-embedding-type rope --attention-dropout 0".split(),
            *f"--hidden-dropout 0 --seq-length {LENGTH} --max-position-embeddings {LENGTH}".split(),
            *f"--micro-batch-size {batch} --global-batch-size {batch}".split(),
            *f"--train-iters {steps} --lr-warmup-iters {steps // 20}".split(),
            *f"--lr {lr} --min-lr {lr / 10} --lr-decay-style cosine --clip-grad 1.0".split(),
            *f"--weight-decay 0.1 --seed {seed}".split(),
            # As many rows as there are problems to solve.
            *f"--eval-interval {steps} --eval-iters {-(-scale.tests // EVALUATED)}".split(),
            *f"--eval-global-batch-size {EVALUATED} --eval-micro-batch-size {EVALUATED}".split(),
            *f"--log-interval {max(1, steps // 20)}".split(),
        ]

    def method_flags(self, settings: dict[str, Any]) -> list[str]:
        """Settings of the objective as flags, with ids for words."""
        found = []
        for name, value in self._with_ids(settings).items():
            found += [flag_of(name)] if value is True else as_flags({name: value})
        return found

    def _with_ids(self, settings: dict[str, Any]) -> dict[str, Any]:
        import sentencepiece

        words = sentencepiece.SentencePieceProcessor(model_file=f"{self.data}/words.model")
        return {
            name: [words.piece_to_id(f"\u2581{word}") for word in value]
            if name.endswith("token_ids")
            else value
            for name, value in settings.items()
        }


def as_json(name: str, found: list[Problem]) -> str:
    """Problems as JSONL: running text to pretrain on (`text`), or pairs."""
    if name == "text":
        lines = [{"text": f" {p.prompt} {p.response}"} for p in found]
    else:
        lines = [{"prompt": f" {p.prompt}", "response": f" {p.response}"} for p in found]
    return "".join(json.dumps(line) + "\n" for line in lines)
