"""The paper's table in small: every method on generated arithmetic problems.

    python examples/reproduce/reproduce.py --scale laptop

makes the problems, trains a tokenizer and a small model, fine-tunes it with every method and seed,
lets each solve held-out problems, and prints a table. Finished runs are kept in --directory: the
same command goes on after an interruption, or only prints (--report).
"""

import argparse
import json
import math
import pathlib
import re
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from problems import problems

from megatron_mdm.benchmarks.runs import PROGRAM, as_flags, kept, read_scalars, run_python
from megatron_mdm.data.outputs import (
    check_picture,
    complete_or_absent,
    termination_raises,
    write_text,
)
from megatron_mdm.errors import UserError, run_tool
from megatron_mdm.recipes import RECIPES

HERE = pathlib.Path(__file__).parent
TOOLS = HERE.parents[1] / "tools"
SEEDS = (42, 731, 20231)  # the paper's
AUTOREGRESSIVE = "autoregressive"
DOUBLED = "standard, rows x 2"  # what MIRROR at equal epochs is to be compared with
STANDARD = {**RECIPES["standard"], "mdm_ema_decay": 1}
# Words that ISAD masks more often, and that SyRM masks in prompts.
DELIMITERS = ["=", ";", "#"]
STRUCTURE = "finds buys gets wins eats sells loses gives".split()
METHODS: dict[str, dict[str, Any]] = {
    "standard": STANDARD,
    "clipped": {**STANDARD, **RECIPES["clipped"]},
    "P-POTS": {**STANDARD, **RECIPES["paper"], "mdm_views": 1},
    "MIRROR": {**STANDARD, "mdm_views": 2},
    "P-POTS + MIRROR": {**STANDARD, **RECIPES["paper"]},
    "recommended": {**STANDARD, **RECIPES["recommended"]},
    AUTOREGRESSIVE: {"mdm_shift": True},
    "StraTS": {**STANDARD, "mdm_quantiles": "strata"},
    "ISAD": {**STANDARD, "mdm_isad_token_ids": DELIMITERS},
    "SyRM": {**STANDARD, "mdm_syrm_token_ids": STRUCTURE, "mdm_syrm_fraction": 0.1},
    DOUBLED: STANDARD,
    "EMA": {**STANDARD, "mdm_ema_decay": 0.9},
}


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        texts, pairs, tests: problems to pretrain on, to fine-tune on, to solve.
        layers, hidden, heads: of the network.
        pretraining, steps: optimizer steps of the pretraining and of each fine-tuning.
        batch: rows in a step.
        methods, seeds: of the study.
    """

    texts: int
    pairs: int
    tests: int
    layers: int
    hidden: int
    heads: int
    pretraining: int
    steps: int
    batch: int
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = SEEDS


SCALES = {
    "ci": Scale(3000, 400, 20, 1, 32, 2, 20, 20, 16, ("standard", "MIRROR", AUTOREGRESSIVE), (42,)),
    "laptop": Scale(40_000, 4000, 300, 2, 96, 4, 2500, 500, 32),
    "gpu": Scale(400_000, 20_000, 1000, 4, 256, 8, 10_000, 4000, 64),
}
LENGTH = 40  # no problem is longer
EVALUATION_ROWS = 256


@dataclass(frozen=True)
class Study:
    """One scale in one directory, on one device."""

    scale: Scale
    directory: pathlib.Path
    device: str

    def prepare(self) -> None:
        """Makes problems, tokenizer and datasets, where they are missing."""
        scale = self.scale
        tests = problems(scale.tests, (2, 3), 3)
        solved = {problem.prompt for problem in tests}
        texts = problems(scale.texts, (1, 2, 3), 1, solved)
        pairs = problems(scale.pairs, (2, 3), 2, solved)
        self._jsonl("text", [{"text": f" {p.prompt} {p.response}"} for p in texts])
        for name, found in (("pairs", pairs), ("test", tests)):
            self._jsonl(
                name, [{"prompt": f" {p.prompt}", "response": f" {p.response}"} for p in found]
            )
        model = self.path("words.model")
        commands = {
            model: f"train_tokenizer.py --input {self.path('text.jsonl')} --output {model} "
            "--vocab-size 448",
            **{
                self.path(f"{name}.idx"): f"preprocess_data.py --input {self.path(name)}.jsonl "
                f"--tokenizer-model {model} --output-prefix {self.path(name)} {keys}"
                for name, keys in (("text", ""), ("pairs", "--prompt-key prompt"))
            },
        }
        for path, command in commands.items():
            if not path.exists():
                tool, *flags = command.split()
                run_python([str(TOOLS / tool), *flags], self.path("data.log"), tool)

    def path(self, name: str) -> pathlib.Path:
        """A file of the study."""
        return self.directory / name

    def _jsonl(self, name: str, lines: list[dict[str, str]]) -> None:
        if not self.path(f"{name}.jsonl").exists():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_text(str(self.path(f"{name}.jsonl")), text)

    def pretrain(self, causal: bool) -> pathlib.Path:
        """Trains the network on running text, once: the directory of its checkpoint."""
        scale = self.scale
        name = "causal" if causal else "diffusion"
        settings: dict[str, Any] = METHODS[AUTOREGRESSIVE] if causal else RECIPES["recommended"]
        checkpoint = self.path(f"pretrained-{name}")
        flags = [
            *self._flags(scale.pretraining, 2 * scale.batch, 3e-3, 1),
            *f"--data-path {self.path('text')} --split 98,2,0".split(),
            *self._method(settings),
            *["--save", str(checkpoint), "--save-interval", str(scale.pretraining)],
        ]

        def work(path: pathlib.Path) -> dict[str, Any]:
            shutil.rmtree(checkpoint, ignore_errors=True)
            return self._train(path, flags, causal, f"the pretraining ({name})")

        kept(self.directory, flags, work)
        return checkpoint

    def fine_tune(self, method: str, seed: int, epochs: bool) -> dict[str, Any]:
        """Trains and scores one run, unless that was done.

        Args:
            method: of `METHODS`.
            seed: of the run.
            epochs: every text as often as `standard` takes it, instead of as many rows.
        """
        scale = self.scale
        causal = method == AUTOREGRESSIVE
        views = 2 if method == DOUBLED else METHODS[method].get("mdm_views", 1)
        batch = scale.batch * (views if epochs else 1)
        flags = [
            *self._flags(scale.steps, batch, 1e-3, seed),
            *f"--data-path {self.path('pairs')} --split 90,10,0".split(),
            *"--mdm-sft --mdm-pad-eligible --mdm-normalization rows --finetune".split(),
            *["--load", str(self.pretrain(causal))],
            *self._method(METHODS[method]),
        ]
        name = f"{method}, seed {seed}, {batch} rows a step"

        def work(path: pathlib.Path) -> dict[str, Any]:
            checkpoint, score = path.with_suffix(".checkpoint"), path.with_suffix(".score")
            shutil.rmtree(checkpoint, ignore_errors=True)
            saving = ["--save", str(checkpoint), "--save-interval", str(scale.steps)]
            result = self._train(path, [*flags, *saving], causal, name)
            command = [str(HERE / "score.py"), "--load", str(checkpoint), "--json", str(score)]
            command += ["--problems", str(self.path("test.jsonl")), "--device", self.device]
            command += ["--causal"] if causal else []
            run_python(command, path.with_suffix(".score.log"), f"the score of {name}")
            result |= json.loads(score.read_text(encoding="utf-8"))
            result["rows"] = batch * scale.steps
            shutil.rmtree(checkpoint)
            score.unlink()
            print(
                f"{name}: {result['accuracy']:.1%} right, {result['nelbo']:.4f} nats/token",
                file=sys.stderr,
                flush=True,
            )
            return result

        return kept(self.directory, flags, work)

    def _train(
        self, path: pathlib.Path, flags: list[str], causal: bool, name: str
    ) -> dict[str, Any]:
        """Trains: the final NELBO, and the root mean square of the gradient's norm at the end."""
        board = path.with_suffix(".tensorboard")
        shutil.rmtree(board, ignore_errors=True)
        program = [str(HERE / "autoregressive.py")] if causal else PROGRAM
        command = [*program, *flags, "--tensorboard-dir", str(board)]
        log = path.with_suffix(".log")
        output = run_python(command, log, name)
        values = re.findall(r"validation NELBO: ([\d.]+)|lm loss value: ([\dE.+-]+)", output)
        if not values:
            raise UserError(f"{name} ended without a validation: its output is in {log}")
        norms = [value for _, value in read_scalars(str(board))["grad-norm"]]
        last = norms[-max(1, len(norms) // 4) :]
        return {
            "nelbo": float(values[-1][0] or values[-1][1]),
            "gradient_norm": math.sqrt(statistics.mean(x * x for x in last)),
        }

    def _flags(self, steps: int, batch: int, lr: float, seed: int) -> list[str]:
        scale = self.scale
        tokenizer = self.path("words.model")
        return [
            *f"--mdm-device {self.device} --transformer-impl local --num-workers 0".split(),
            *f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {tokenizer}".split(),
            *"--make-vocab-size-divisible-by 64 --normalization RMSNorm --swiglu".split(),
            *f"--num-layers {scale.layers} --hidden-size {scale.hidden}".split(),
            *f"--num-attention-heads {scale.heads}".split(),
            *f"--ffn-hidden-size {scale.hidden * 8 // 3}".split(),
            *"--disable-bias-linear --position-embedding-type rope --attention-dropout 0".split(),
            *f"--hidden-dropout 0 --seq-length {LENGTH} --max-position-embeddings {LENGTH}".split(),
            *f"--micro-batch-size {batch} --global-batch-size {batch}".split(),
            *f"--train-iters {steps}".split(),
            *f"--lr {lr} --min-lr {lr / 10} --lr-decay-style cosine --clip-grad 1.0".split(),
            *f"--lr-warmup-iters {steps // 20} --weight-decay 0.1 --seed {seed}".split(),
            *f"--eval-interval {steps} --eval-iters {EVALUATION_ROWS // 32}".split(),
            *"--eval-global-batch-size 32 --eval-micro-batch-size 32".split(),
            *f"--log-interval {max(1, steps // 20)}".split(),
            *f"--data-cache-path {self.path('cache')}".split(),
        ]

    def _method(self, settings: dict[str, Any]) -> list[str]:
        """A method's flags, with ids for words."""
        import sentencepiece

        words = sentencepiece.SentencePieceProcessor(model_file=str(self.path("words.model")))
        flags = []
        for name, value in settings.items():
            if name.endswith("token_ids"):
                value = [words.piece_to_id(f"\u2581{word}") for word in value]
            flags += [f"--{name.replace('_', '-')}"] if value is True else as_flags({name: value})
        return flags


def tasks(scale: Scale) -> list[tuple[str, int, bool]]:
    """Method, seed, and whether it is the run at equal epochs, in the order that is run.

    Only methods with several views have such a run of their own. What says less comes last:
    `standard` with the rows that these methods take, and EMA, which repeats what `standard` does.
    """
    methods = [m for m in scale.methods if m not in (DOUBLED, "EMA")]
    found = []
    for seed in scale.seeds:
        found += [(method, seed, False) for method in methods]
        found += [(m, seed, True) for m in methods if METHODS[m].get("mdm_views", 1) > 1]
    last = [m for m in scale.methods if m not in methods]
    return found + [(m, seed, m == DOUBLED) for m in last for seed in scale.seeds]


def as_text(results: Sequence[dict[str, Any]]) -> str:
    """Both tables of the runs that `main` writes."""
    lines = []
    for title, epochs in (("equal rows", False), ("equal epochs", True)):
        lines += [
            f"{title:20s}{'accuracy':>10s}{'max - min':>11s}{'std':>8s}{'NELBO':>9s}"
            f"{'gradient':>10s}{'rows':>9s}{'seeds':>7s}"
        ]
        for method, runs in _by_method(results, epochs).items():
            accuracy = [100 * run["accuracy"] for run in runs]
            spread = f"{max(accuracy) - min(accuracy):.1f}" if len(runs) > 1 else "-"
            std = f"{statistics.stdev(accuracy):.1f}" if len(runs) > 1 else "-"
            nelbo, norm = (statistics.mean(run[x] for run in runs) for x in NUMBERS)
            lines += [
                f"{method:20s}{statistics.mean(accuracy):9.1f}%{spread:>11s}{std:>8s}{nelbo:9.4f}"
                f"{norm:10.3f}{runs[0]['rows']:9d}{len(runs):7d}"
            ]
        lines += [""]
    return "\n".join(lines[:-1])


NUMBERS = ("nelbo", "gradient_norm")


def _by_method(results: Sequence[dict[str, Any]], epochs: bool) -> dict[str, list[dict[str, Any]]]:
    """The runs that stand in one of the two tables, by method, in the order of `METHODS`.

    Args:
        results: runs.
        epochs: at equal epochs, where a text of several views takes as many rows.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for method, settings in METHODS.items():
        own = epochs and (method == DOUBLED or settings.get("mdm_views", 1) > 1)
        runs = [r for r in results if r["method"] == method and r["epochs"] == own]
        if runs:
            found[method] = runs
    return found


def draw(results: Sequence[dict[str, Any]], path: str) -> None:
    """Accuracy of every run, and the noise of its gradient, at equal rows and at equal epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for epochs, color, shift, name in ((False, "C0", 0.12, "rows"), (True, "C3", -0.12, "epochs")):
        found = _by_method(results, epochs)
        for axes, key, factor in ((left, "accuracy", 100), (right, "gradient_norm", 1)):
            label = f"equal {name}"
            for method, runs in found.items():
                if not runs[0]["epochs"] and epochs:
                    continue  # the same runs
                y = shift - list(METHODS).index(method)
                values = [factor * run[key] for run in runs]
                axes.plot(values, [y] * len(values), "o", color=color, ms=4, alpha=0.6)
                axes.plot(
                    [statistics.mean(values)], [y], "|", color=color, ms=16, mew=2, label=label
                )
                label = "_"  # one entry of the legend
    left.set(xlabel="problems solved (%)", yticks=[-i for i in range(len(METHODS))])
    left.set_ylim(0.5 - len(METHODS), 0.5)
    left.set_yticklabels(METHODS)
    left.legend()
    right.set(xlabel="norm of a batch's gradient, root mean square of the last quarter")
    with complete_or_absent(path) as (temporary,):
        figure.savefig(temporary, dpi=100, format=path.rpartition(".")[2])
    plt.close(figure)


def main() -> None:
    """Runs what is missing, prints, writes, draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scale", choices=SCALES, help="ci: minutes, laptop: hours on two cores, gpu: for a GPU"
    )
    parser.add_argument(
        "--directory", default="runs/reproduce", metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", metavar="FILE", help="also write the results here, run by run")
    parser.add_argument("--figure", metavar="FILE", help="also draw them: .png or .svg")
    parser.add_argument("--report", metavar="FILE", help="of the results in FILE: train nothing")
    options = parser.parse_args()
    if options.figure:
        check_picture(options.figure, "--figure")
    results: list[dict[str, Any]] = []
    try:
        if options.report:
            results += read_results(options.report)
        elif options.scale:
            with termination_raises():
                run_all(options, results)
        else:
            raise UserError("give --scale to train, or --report FILE to print")
    finally:
        if results:
            print(as_text(results))
            if options.figure:
                draw(results, options.figure)


def read_results(path: str) -> list[dict[str, Any]]:
    """Reads what --json wrote.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--report {path}: cannot be read ({error}); give a file of --json"
        ) from error


def run_all(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Appends the result of every run, and writes all to --json after each."""
    scale = SCALES[options.scale]
    directory = pathlib.Path(options.directory, options.scale)
    directory.mkdir(parents=True, exist_ok=True)
    study = Study(scale, directory, options.device)
    study.prepare()
    for method, seed, epochs in tasks(scale):
        result = study.fine_tune(method, seed, epochs)
        result["flags"] = " ".join(result["flags"])
        results.append({"method": method, "seed": seed, "epochs": epochs, **result})
        if options.json:
            write_text(options.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
