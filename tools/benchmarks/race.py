"""Training with each recipe at equal compute, through `-m megatron_mdm.pretrain`.

A small byte-level model is trained on the source of Python's standard library: the same rows in a
batch, batches and schedule for all, one run for each recipe and seed. Reported are the NELBO on
held-out text at the end, which is measured alike for all recipes and on the same rows for one seed,
and the steps after which a recipe has reached what `standard` has at its end. Finished runs are
kept in --directory, so that an interrupted race goes on where it was; those of another program or
of other data are trained anew.
"""

import argparse
import math
import pathlib
import re
import shlex
import statistics
import sys

from benchmarks.python_text import MASK, write_data
from megatron_mdm.errors import UserError, check_numbers
from megatron_mdm.experiments.runs import PROGRAM, as_flags, run_cached, run_parallel, run_python
from megatron_mdm.files import write_json, write_text
from megatron_mdm.recipes import RECIPES, settings_of

DESCRIPTION = "final NELBO of each recipe at equal compute"
EVALUATIONS = 20
# Settings of each competitor, each once: the recipes, and what was tried beside them.
COMPETITORS: dict[str, dict] = {
    **RECIPES,
    **{
        name: settings_of(name)
        for name in (
            "mirror",
            "ppots-loss",
            "ppots-gradient",
            "lattice+exact-count",
            "clipped+lattice+exact-count",
        )
    },
    # Of `recommended`: more of the uniform; a first fit after 500 steps, until which the uniform is
    # in use; a density that does not move with the model, 0.9 t^-1/2 / 2 + 0.1.
    "recommended-half-uniform": {**RECIPES["recommended"], "ppots_uniform_share": 0.5},
    "recommended-late": {**RECIPES["recommended"], "ppots_refit_interval": 500},
    "recommended-fixed": {
        **settings_of("lattice+exact-count"),
        **{"rate_sampler": "ppots", "ppots_file": "DIRECTORY/density.json"},
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--directory",
        default="runs/race",
        metavar="DIR",
        help="keeps the data and the finished runs (default: %(default)s)",
    )
    parser.add_argument("--length", type=int, default=64, help="row length (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=32, help="rows in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=2000, help="steps of each run (default: %(default)s)"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="peak rate (default: %(default)s)")
    parser.add_argument(
        "--clip-grad", type=float, default=1.0, help="0: no clipping (default: %(default)s)"
    )
    parser.add_argument(
        "--positions",
        choices=["rope", "learned_absolute"],
        default="rope",
        help="position embedding (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)", metavar="N"
    )
    parser.add_argument(
        "--competitors",
        nargs="+",
        choices=COMPETITORS,
        default=list(RECIPES),
        metavar="NAME",
        help=f"of {', '.join(COMPETITORS)} (default: the recipes); standard always runs",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, one thread each (default: %(default)s)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--flags",
        default="",
        metavar="TEXT",
        help="more flags of all runs, such as another model or --data-path; they win",
    )


def run(args: argparse.Namespace) -> None:
    """Trains what is missing, prints a table, and writes `args.json` if it is set.

    Raises:
        UserError: settings that cannot work, or a run that failed.
    """
    check_numbers(args, "length", "batch", "jobs")
    if args.steps < EVALUATIONS or args.steps % EVALUATIONS:
        raise UserError(f"--steps {args.steps}: must be a multiple of {EVALUATIONS}")
    directory = pathlib.Path(args.directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_data(directory)
    write_density(directory)
    names = list(dict.fromkeys(["standard", *args.competitors]))
    tasks = [(name, seed) for seed in args.seeds for name in names]
    trained = run_parallel(args.jobs, lambda task: _curve(args, *task), tasks)
    curves = dict(zip(tasks, trained, strict=True))
    results = {
        name: {
            str(seed): {
                "final_nelbo": curves[name, seed][-1],
                "steps_to_standard_final": steps_to(
                    curves[name, seed], curves["standard", seed][-1], args.steps // EVALUATIONS
                ),
            }
            for seed in args.seeds
        }
        for name in names
    }
    print(_table(results, args))
    if args.json:
        write_json(args.json, results)


def steps_to(curve: list[float], target: float, interval: int) -> float | None:
    """Steps after which a curve first is at `target` or below, interpolated; None: never.

    Args:
        curve: NELBO after `interval`, 2 `interval`, ... steps.
        target: NELBO to reach.
        interval: steps between values.
    """
    for i, value in enumerate(curve):
        if value <= target:
            before = curve[i - 1] if i else math.inf
            part = (before - target) / (before - value) if math.isfinite(before) else 1.0
            return interval * (i + part)
    return None


def write_density(directory: pathlib.Path) -> None:
    """The density of `recommended-fixed`, as a file of --mdm-ppots-file."""
    from megatron_mdm.objective.ppots.fit import PpotsFit, tabulate
    from megatron_mdm.objective.ppots.fit_file import sampler_text
    from megatron_mdm.objective.ppots.moments import RateMoments
    from megatron_mdm.objective.samplers import mixture

    eps, uniform_share = 1e-3, 0.1
    table = mixture(*tabulate(lambda t: ((1 - eps) * t + eps) ** -0.5), uniform_share)
    fit = PpotsFit(
        "gradient",
        family="given",
        parameters={},
        kl=0.0,
        kls={},
        uniform_share=uniform_share,
        eps=eps,
        moments=RateMoments(1),
        table=table,
    )
    write_text(str(directory / "density.json"), sampler_text(fit))


def _flags(args: argparse.Namespace, directory: pathlib.Path, seed: int) -> list[str]:
    return [
        *f"--mdm-device {args.device} --tokenizer-type NullTokenizer --vocab-size 257".split(),
        *"--null-tokenizer-eod-id 0 --make-vocab-size-divisible-by 2".split(),
        *f"--mdm-mask-token-id {MASK} --data-path {directory / 'text'} --split 95,5,0".split(),
        *f"--data-cache-path {directory / 'cache'} --num-workers 0 --seed {seed}".split(),
        *"--num-layers 3 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 256".split(),
        *"--normalization RMSNorm --swiglu --disable-bias-linear".split(),
        *f"--position-embedding-type {args.positions} --seq-length {args.length}".split(),
        *f"--max-position-embeddings {args.length} --attention-dropout 0".split(),
        *f"--hidden-dropout 0 --micro-batch-size {args.batch}".split(),
        *f"--global-batch-size {args.batch} --train-iters {args.steps} --lr {args.lr}".split(),
        *f"--min-lr {args.lr / 10} --lr-decay-style cosine --weight-decay 0.1".split(),
        *f"--lr-warmup-iters {args.steps // 20} --clip-grad {args.clip_grad}".split(),
        *f"--eval-interval {args.steps // EVALUATIONS} --log-interval 50".split(),
        *f"--eval-iters {-(-512 // args.batch)} --eval-global-batch-size {args.batch}".split(),
        *shlex.split(args.flags),
    ]


def _curve(args: argparse.Namespace, name: str, seed: int) -> list[float]:
    """Trains one run, or reads it if it was finished: its NELBO at every evaluation."""
    directory = pathlib.Path(args.directory)
    # A run is named by its settings: a recipe that changes is trained again.
    flags = [word.replace("DIRECTORY", str(directory)) for word in as_flags(COMPETITORS[name])]
    settings = [*_flags(args, directory, seed), *flags]

    def train(path: pathlib.Path) -> dict:
        log = path.with_suffix(".log")
        output = run_python([*PROGRAM, *settings], log, f"the run of {name} with seed {seed}")
        values = re.findall(r"validation NELBO: ([0-9.]+)", output)
        if len(values) < EVALUATIONS:
            raise UserError(f"the run of {name} with seed {seed} has no NELBO: its log is {log}")
        nelbo = [float(value) for value in values[:EVALUATIONS]]
        print(f"{name}, seed {seed}: {nelbo[-1]:.4f} nats/token", file=sys.stderr, flush=True)
        return {"nelbo": nelbo}

    return run_cached(directory, settings, train)["nelbo"]


def _table(results: dict, args: argparse.Namespace) -> str:
    lines = [
        f"length {args.length}, {args.steps} steps of {args.batch} rows, clipping "
        f"{args.clip_grad:g}, {len(args.seeds)} seeds; final NELBO in nats/token",
        f"{'':36s} {'NELBO':>8s} {'minus standard':>18s} {'steps to its final':>20s}",
    ]
    standard = results["standard"]
    for name, seeds in results.items():
        final = [run["final_nelbo"] for run in seeds.values()]
        difference = [seeds[s]["final_nelbo"] - standard[s]["final_nelbo"] for s in seeds]
        spread = statistics.stdev(difference) / len(final) ** 0.5 if len(final) > 1 else math.nan
        steps = [run["steps_to_standard_final"] for run in seeds.values()]
        reached = f"{statistics.mean(steps):.0f}" if None not in steps else "not reached"
        lines.append(
            f"{name:36s} {statistics.mean(final):8.4f} {statistics.mean(difference):+9.4f} +- "
            f"{spread:.4f} {reached:>20s}"
        )
    return "\n".join(lines)
