"""Trains a tiny model for thousands of steps, stops and kills it, and checks what that changes.

There are two runs of the same flags, each with half of --steps, with evaluations and saves. Their
rates come from a bell. It fades, and then P-POTS fits the density. The first run is not
interrupted. The second one is struck at random moments: SIGKILL for one rank, for the launcher or
for all processes, and SIGTERM to the launcher. It resumes by the same command, and after half of
its iterations it goes through the other --layouts. Some of its starts save with --async-save and
load rows in worker processes, as the first run does.

The soak fails if losses, gradient norms, evaluations or fitted densities differ by a bit where the
layout is the same; if losses after a change of layout differ by more than 1e-5 of their value from
those of the same checkpoint in the old layout, for 20 steps; if the memory of a process grows; if
processes, files or shared memory stay behind. The table says what was found.
"""

import argparse
import os
import pathlib
import sys
import time
from typing import Any

from benchmarks.timing import device_name
from megatron_mdm.errors import UserError, check_numbers
from megatron_mdm.files import check_output, termination_raises, write_json

DESCRIPTION = (
    "whether a long run that is killed and resumed stays the same, and stays in its bounds"
)
_STATUS = {None: {0}, "stop": {75}, "launcher": {-9}, "all": {-9}}  # any failure for a rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    from benchmarks.soak.plan import LAYOUTS

    parser.add_argument("--json", metavar="FILE", help="write the results here after each start")
    parser.add_argument(
        "--steps",
        type=int,
        default=20_000,
        metavar="N",
        help="steps of both runs together (default: %(default)s)",
    )
    parser.add_argument(
        "--strikes",
        type=int,
        default=8,
        metavar="N",
        help="how often the second run is killed or stopped (default: %(default)s)",
    )
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=list(LAYOUTS),
        default=["DP2", "TP2", "PP2", "one", "DP2"],
        metavar="LAYOUT",
        help=f"layouts of the second run, some of {', '.join(LAYOUTS)}; the first run has the "
        "first one (default: DP2 TP2 PP2 one DP2)",
    )
    parser.add_argument(
        "--foreground",
        action="store_true",
        help="no start saves with --async-save or loads rows in worker processes",
    )
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="seed of all (default: %(default)s)"
    )
    parser.add_argument(
        "--directory",
        default="runs/soak",
        metavar="DIR",
        help="new directory for the runs (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Does the soak, prints its table, and ends with status 1 if a check has failed.

    Raises:
        UserError: a setting is not possible, or a run hangs or fails without a strike.
    """
    from benchmarks.soak.plan import make_plan

    check_numbers(args, "steps")
    directory = pathlib.Path(args.directory).resolve()
    if directory.exists():
        raise UserError(f"--directory {args.directory} exists: remove it, or give another one")
    if args.steps < 200 * len(args.layouts):
        raise UserError(f"--steps {args.steps}: give at least 200 for each of the --layouts")
    if args.strikes < 0:
        raise UserError(f"--strikes {args.strikes}: must not be negative")
    if args.json:
        check_output(args.json, "--json")
    plan = make_plan(args.steps, args.layouts, args.strikes, args.seed)
    with termination_raises():
        results = Soak(plan, directory, args).results()
    print(table(results))
    if results["failures"]:
        sys.exit(1)


class Soak:
    """Two runs of one plan, and what was seen of them.

    Args:
        plan: a `plan.Plan`.
        directory: directory that is created for them.
        args: options of `add_arguments`.
    """

    def __init__(self, plan: Any, directory: pathlib.Path, args: argparse.Namespace) -> None:
        from benchmarks.python_text import write_data
        from benchmarks.soak.plan import flags_of
        from megatron_mdm.environment import prepare_environment
        from megatron_mdm.experiments.program import program

        self.plan, self.directory, self.args = plan, directory, args
        self.scratch = directory / "tmp"
        self.scratch.mkdir(parents=True)
        self.temporary: set[str] = set()
        prepare_environment("cpu")
        write_data(directory)
        self.flags = flags_of(plan, directory, args.seed)
        self.found: dict[str, Any] = {
            "benchmark": "soak",
            "program": program(),
            "device": device_name("cpu"),
            "cores": os.cpu_count(),
            "steps": args.steps,
            "layouts": args.layouts,
            "seed": args.seed,
            "foreground": args.foreground,
            "intervals": plan.interval,
            "starts": [],
            "changes": [],
            "memory": {},
            "failures": [],
        }

    def results(self) -> dict[str, Any]:
        """Does both runs and all checks."""
        from benchmarks.soak import checks

        begin = time.monotonic()
        plan = self.plan
        whole = self._start("whole", plan.legs[0].layout, plan.iterations, 0)
        self.found["memory"] = checks.slopes(whole.samples)
        for role, values in self.found["memory"].items():
            if values["slope"] > checks.FLAT and not role.endswith("RSS"):
                self._fail(f"the memory of {role} grows by {values['slope']:.0f} KiB/1,000 steps")
        self._struck()
        self._compare()
        self._bounds()
        self.found["minutes"] = round((time.monotonic() - begin) / 60, 1)
        self._write()
        return self.found

    def _struck(self) -> None:
        """Does the struck run, through all of its legs."""
        strikes = list(self.plan.strikes)
        number = 0
        before = None
        for leg in self.plan.legs:
            if before is not None:
                self._old_layout(before)
            while True:
                strike = strikes[0] if strikes else None
                start = self._start("struck", leg.layout, leg.end, number, strike)
                number += 1
                if start.strike is None:
                    break
                strikes.pop(0)
            before = leg
        if strikes:
            self._fail(f"{len(strikes)} strikes came too late: the run had ended")

    def _old_layout(self, leg: Any) -> None:
        """Continues the checkpoint at the end of a leg in the same layout for some steps."""
        from benchmarks.soak.plan import COMPARED

        if leg is self.plan.legs[0]:
            return  # the uninterrupted run goes on in this layout
        load = f"--load {self.directory / 'struck' / 'checkpoint'} --ckpt-step {leg.end}"
        log = f"--tensorboard-dir {self.directory / f'old_{leg.end}' / 'tb'}"
        self._start(f"old_{leg.end}", leg.layout, leg.end + COMPARED, 0, flags=f"{load} {log}")

    def _start(
        self,
        name: str,
        layout: str,
        end: int,
        number: int,
        strike: Any = None,
        flags: str | None = None,
    ) -> Any:
        """Starts a run once and records what is left of it.

        Args:
            name: name of the run's directory.
            layout: its layout.
            end: iteration at which it ends.
            number: number of earlier starts of this run.
            strike: a strike that is due.
            flags: flags in place of those of a run that saves.
        """
        from benchmarks.soak import checks
        from benchmarks.soak.job import run_job
        from benchmarks.soak.plan import BACKGROUND, LAYOUTS, retained, saving

        place = self.directory / name
        place.mkdir(exist_ok=True)
        ranks, divided = LAYOUTS[layout]
        own = saving(self.plan, place) if flags is None else flags.split()
        in_background = flags is None and number % 3 == 0 and not self.args.foreground
        words = [*self.flags, *divided.split(), *own, "--exit-interval", str(end)]
        words += BACKGROUND.split() if in_background else []
        log = place / f"{number}.log"
        start = run_job(ranks, words, log, self.scratch, strike)
        kind = start.strike.kind if start.strike else None
        if kind is None and start.status:
            raise UserError(f"the run {name} ended with status {start.status}: its log is {log}")
        if start.status not in _STATUS.get(kind, {start.status or -1}):
            self._fail(f"{name} {number}: status {start.status} after {kind}")
        for line in start.left:
            self._fail(f"{name} {number}: a process stays: {line}")
        temporary = {path.name for path in self.scratch.iterdir()} - self.temporary
        self.temporary |= temporary
        if start.segments and kind != "all":  # else nobody was left to remove them
            self._fail(f"{name} {number}: shared memory stays: {', '.join(start.segments)}")
        # A killed process cannot remove its own sockets; the guide to checkpoints names them.
        staying = {file for file in temporary if kind != "rank" or not file.startswith("pymp-")}
        if staying and kind not in ("all", "launcher"):
            self._fail(f"{name} {number}: temporary files stay: {', '.join(sorted(staying))}")
        self.found["starts"].append(
            {
                "run": name,
                "layout": layout,
                "end": end,
                "background": in_background,
                "strike": kind,
                "at": start.strike.iteration if start.strike else None,
                "status": start.status,
                "seconds": start.seconds,
                "gone": start.gone,
                "samples": start.samples,
                "stray": checks.stray(place / "checkpoint", retained(self.plan)),
                "temporary": sorted(temporary),
                "segments": start.segments,
                **{
                    kind: checks.files_under(place / kind if kind != "cache" else self._cache())
                    for kind in ("checkpoint", "tb", "cache")
                },
            }
        )
        self._write()
        return start

    def _cache(self) -> pathlib.Path:
        return self.directory / "cache"

    def _compare(self) -> None:
        """Compares the losses of both runs, and those after each change of layout."""
        from benchmarks.soak import checks

        whole, _ = checks.scalars_of(self.directory / "whole" / "tb")
        struck, wrong = checks.scalars_of(self.directory / "struck" / "tb")
        first, *others = self.plan.legs
        wrong += checks.unequal(struck, whole, first.end)
        gaps = checks.missing(struck, self.plan.iterations)
        if wrong:
            self._fail(f"{len(wrong)} values differ, such as {wrong[0]}")
        if gaps:
            self._fail(f"TensorBoard lacks {len(gaps)} iterations, such as {gaps[0]}")
        self.found["equal"] = {
            tag: sum(iteration <= first.end for iteration in values)
            for tag, values in whole.items()
        }
        for before, leg in zip([first, *others], others, strict=False):
            old = whole
            if before is not first:
                old, _ = checks.scalars_of(self.directory / f"old_{before.end}" / "tb")
            largest = checks.difference(struck, old, before.end)
            self.found["changes"].append(
                {
                    "after": before.end,
                    "from": before.layout,
                    "to": leg.layout,
                    "difference": largest,
                }
            )
            if not largest <= checks.CLOSE:
                self._fail(f"{before.layout} to {leg.layout}: losses differ by {largest:.1e}")

    def _bounds(self) -> None:
        """Checks that files do not accumulate."""
        starts = self.found["starts"]
        last = [start for start in starts if start["run"] == "struck"][-1]
        if last["stray"]:
            self._fail(f"files stay beside the checkpoints: {', '.join(last['stray'])}")
        if starts[-1]["cache"]["files"] != starts[0]["cache"]["files"]:
            self._fail("the index cache grows with each start")

    def _fail(self, line: str) -> None:
        print(f"failed: {line}", file=sys.stderr, flush=True)
        self.found["failures"].append(line)

    def _write(self) -> None:
        if self.args.json:
            write_json(self.args.json, self.found)


def table(results: dict[str, Any]) -> str:
    """The results as text."""
    lines = [
        f"{results['steps']} steps in {results['minutes']} min, {results['cores']} cores, "
        f"{results['device']}, {results['program']}",
        "",
        f"{'run':10}{'layout':8}{'to':>7}{'background':>12}{'strike':>10}{'at':>7}{'status':>8}"
        f"{'s':>8}{'s to end':>10}{'MB saved':>10}{'left':>6}",
    ]
    for start in results["starts"]:
        lines.append(
            f"{start['run']:10}{start['layout']:8}{start['end']:7}"
            f"{'yes' if start['background'] else '':>12}{start['strike'] or '':>10}"
            f"{start['at'] or '':>7}{start['status']:8}{start['seconds']:8.0f}{start['gone']:10.1f}"
            f"{start['checkpoint']['bytes'] / 1e6:10.1f}{len(start['stray']):6}"
        )
    lines += [
        "",
        f"{'memory of the first run':28}{'MiB at half':>12}{'at end':>9}{'KiB/1,000':>11}",
    ]
    for role, values in results["memory"].items():
        numbers = f"{values['middle']:12.1f}{values['end']:9.1f}{values['slope']:11.1f}"
        lines.append(f"{role:28}{numbers}")
    if not results["memory"]:
        lines.append("too few samples")
    lines.append("")
    for tag, count in results["equal"].items():
        lines.append(f"{tag}: {count} values compared bit by bit")
    for change in results["changes"]:
        lines.append(
            f"{change['from']} to {change['to']} after {change['after']}: losses of the next steps "
            f"differ by {change['difference']:.1e}"
        )
    failed = [f"failed: {line}" for line in results["failures"]]
    return "\n".join([*lines, "", *(failed or ["nothing failed"])])
