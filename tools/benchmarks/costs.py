"""What the objective adds to a training step, part by part, as shares of the step, on the CPU.

The quickstart's model and batch are trained with --mdm-recipe recommended, which uses every part:
its own P-POTS, refitted every 50 iterations, from norms of gradients. The parts are timed where
they run, each without the others inside it, in processor time; what is done once per interval (a
fit, a log line) is spread over the steps of it. The loader works in the process itself, so that its
cost counts. `stepping` is all that Megatron's training step took, these parts included. The head at
masked positions is left out: it saves more than it costs, which `overhead` measures.

One rank trains; under tensor parallelism every rank masks and fits for itself. Then checkpoints are
saved and loaded in turns with the state of P-POTS and without.
"""

import argparse
import contextlib
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from types import SimpleNamespace
from typing import Any

from benchmarks.overhead import model_flags
from benchmarks.race import write_data
from benchmarks.timing import device_name
from megatron_mdm.environment import prepare_environment
from megatron_mdm.errors import UserError, check_numbers
from megatron_mdm.files import write_json

DESCRIPTION = "what each part of the objective costs of a training step"
QUICKSTART = {"layers": 4, "hidden": 128, "heads": 4, "rows": 32, "length": 128}
VOCABULARY = 2048
PARTS = ("row uniforms", "check of rows", "masks", "sampler", "statistics", "refit", "metrics")
MEGATRON = "Megatron"  # calls back into it, which belong to no part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--steps", type=int, default=100, metavar="N", help="a multiple of 100 (default: 100)"
    )
    parser.add_argument(
        "--checkpoints", type=int, default=5, metavar="N", help="saves of each kind (default: 5)"
    )


def run(args: argparse.Namespace) -> None:
    """Measures, prints a table, and writes `args.json` if it is set.

    Raises:
        UserError: a number that cannot work.
    """
    if args.steps < 1 or args.steps % 100:
        raise UserError(f"--steps {args.steps}: must be a multiple of 100, whole log intervals")
    check_numbers(args, "checkpoints")
    prepare_environment("cpu")
    with tempfile.TemporaryDirectory() as directory, redirect_stdout(sys.stderr):
        results = measure(pathlib.Path(directory), args.steps, args.checkpoints)
    print(_table(results))
    if args.json:
        write_json(args.json, results)


class Stopwatch:
    """Processor time by label; what runs inside something else does not count for that."""

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock = clock
        self._inside: list[float] = []

    def timed(self, label: str, function: Callable) -> Callable:
        """The function, with its time under `label`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                spent = self._clock() - start
                self.seconds[label] += spent - self._inside.pop()
                if self._inside:
                    self._inside[-1] += spent

        return run


@contextlib.contextmanager
def wrapped(places: list[tuple[Any, str, Callable[[Callable], Callable]]]) -> Iterator[None]:
    """Puts wrapper(function) in the place of every owner.name inside the block."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, wrapper in places:
            setattr(owner, name, wrapper(getattr(owner, name)))
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def measure(
    directory: pathlib.Path, steps: int, checkpoints: int, sizes: dict[str, int] = QUICKSTART
) -> dict[str, Any]:
    """Times of all parts over so many steps, and of checkpoints with and without our state.

    Args:
        directory: for data and checkpoints.
        steps: whole intervals of 100 steps.
        checkpoints: saves with the state, and as many without.
        sizes: of model and batch, as in `overhead`.
    """
    import torch

    from megatron_mdm.mcore.device import training_device

    write_data(directory)
    flags = [
        *model_flags(sizes, VOCABULARY, "cpu"),
        *f"--data-path {directory / 'text'} --data-cache-path {directory / 'cache'}".split(),
        *"--mdm-recipe recommended".split(),
    ]
    flags.remove("--untie-embeddings-and-output-weights")
    with training_device("cpu"):
        from benchmarks.session import training_session

        with training_session(flags) as session:
            watch = Stopwatch()
            ours = session.objective
            rows = session.rows(ours.datasets_provider)
            session.step(ours.forward_step, rows, ours.after_gradients)
            session.iteration = 0  # whole intervals, without what only a first step does
            with wrapped(_places(watch)):
                finalize = watch.timed("metrics", ours.after_gradients)
                step = watch.timed("rest of the step", session.step)
                for _ in range(steps):
                    step(ours.forward_step, rows, finalize)
            state = _checkpoints(session, directory / "checkpoint", checkpoints)
    stepping = sum(watch.seconds.values())
    shares = {part: watch.seconds[part] / stepping for part in PARTS}
    return {
        "benchmark": "costs",
        "device": device_name("cpu"),
        "clock": "processor time of the process",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **sizes,
        "vocabulary": VOCABULARY,
        "steps": steps,
        "step_seconds": stepping / steps,
        "part_seconds_per_step": {part: watch.seconds[part] / steps for part in PARTS},
        "part_shares": shares,
        "share": sum(shares.values()),
        "checkpoint": state,
    }


def _places(watch: Stopwatch) -> list[tuple[Any, str, Callable[[Callable], Callable]]]:
    """Where the parts are called."""
    from megatron_mdm.mcore.data import batch
    from megatron_mdm.mcore.data import row_dataset as dataset
    from megatron_mdm.mcore.model import masked_head as head
    from megatron_mdm.mcore.training import hooks, metrics
    from megatron_mdm.mcore.training.ppots import OnlineSampler
    from megatron_mdm.objective.corruption import Corrupter
    from megatron_mdm.objective.quantiles import Quantiles

    def in_backward(record_norms: Callable) -> Callable:
        """Times the hook that it registers, which works in the backward pass."""

        def register(hidden_states: Any, *rest: Any) -> None:
            seen = SimpleNamespace(
                requires_grad=hidden_states.requires_grad,
                register_hook=lambda look: hidden_states.register_hook(
                    watch.timed("statistics", look)
                ),
            )
            record_norms(seen, *rest)

        return register

    places = [
        (dataset, "row_uniforms", "row uniforms"),
        (Quantiles, "__call__", "row uniforms"),
        (dataset.RowDataset, "_check_ids", "check of rows"),
        (batch, "eligible_positions", "masks"),
        (Corrupter, "__call__", "masks"),
        (OnlineSampler, "__call__", "sampler"),
        (metrics.Recorder, "add", "statistics"),
        (OnlineSampler, "record", "statistics"),
        (OnlineSampler, "end_iteration", "refit"),
        (hooks, "finalize_model_grads", MEGATRON),
    ]
    labelled = [(owner, name, partial(watch.timed, label)) for owner, name, label in places]
    return [*labelled, (head, "_register_grad_norm_hook", in_backward)]


def _checkpoints(session: Any, directory: pathlib.Path, repeats: int) -> dict[str, Any]:
    """Bytes of our state, and seconds of saving and loading whole checkpoints with and without."""
    from megatron.core.utils import unwrap_model
    from megatron.training.checkpointing import load_checkpoint, save_checkpoint

    model = unwrap_model(session.model[0])
    sampler = model.mdm_sampler
    args = session.args
    session.optimizer.step()  # gives the optimizer's state, as any run has it
    clock = {(side, what): [] for side in ("with", "without") for what in ("save", "load")}
    size = {}
    for repeat in range(repeats + 1):  # the first one warms up
        for side in ("with", "without") if repeat % 2 else ("without", "with"):
            model._modules.pop("mdm_sampler", None)
            if side == "with":
                model.mdm_sampler = sampler
            args.save = args.load = str(directory)
            start = time.process_time()
            save_checkpoint(1, session.model, session.optimizer, session.scheduler, 0)
            saved = time.process_time()
            load_checkpoint(session.model, session.optimizer, session.scheduler)
            if repeat:
                clock[side, "save"].append(saved - start)
                clock[side, "load"].append(time.process_time() - saved)
            files = [file for file in directory.rglob("*") if file.is_file()]
            size[side] = sum(file.stat().st_size for file in files)
            shutil.rmtree(directory)
    seconds = {key: statistics.median(values) for key, values in clock.items()}
    return {
        "state_bytes": sampler.bits.numel() * sampler.bits.element_size(),
        "bytes_added": size["with"] - size["without"],
        "bytes": size["with"],
        **{f"{what}_seconds": seconds["with", what] for what in ("save", "load")},
        **{
            f"{what}_seconds_added": seconds["with", what] - seconds["without", what]
            for what in ("save", "load")
        },
    }


def _table(results: dict[str, Any]) -> str:
    lines = [
        f"the quickstart's model, {results['device']}, threads {results['threads']}: "
        f"{results['step_seconds']:.3f} s a step, {results['clock']}",
        f"{'':16}{'ms a step':>10}{'share':>9}",
    ]
    for part, share in results["part_shares"].items():
        lines.append(f"{part:16}{1e3 * results['part_seconds_per_step'][part]:>10.3f}{share:>9.3%}")
    total = sum(results["part_seconds_per_step"].values())
    lines.append(f"{'together':16}{1e3 * total:>10.3f}{results['share']:>9.3%}")
    state = results["checkpoint"]
    lines.append(
        f"state in a checkpoint: {state['state_bytes']} bytes; the files grow by "
        f"{state['bytes_added']} of {state['bytes']}, saving by "
        f"{1e3 * state['save_seconds_added']:.1f} of {1e3 * state['save_seconds']:.0f} ms, loading "
        f"by {1e3 * state['load_seconds_added']:.1f} of {1e3 * state['load_seconds']:.0f} ms"
    )
    return "\n".join(lines)
