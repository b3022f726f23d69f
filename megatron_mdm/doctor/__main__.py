r"""Says which features can run on this machine, and what is missing for the others.

    python -m megatron_mdm.doctor -- --bf16 --fp8-format hybrid --fp8-recipe tensorwise

prints versions, GPUs, environment variables and features, and ends with status 1 if a feature that
these flags of a launch use cannot run. Without flags the report is for people and bug reports, and
the status is 0. Under torchrun or megatron_mdm.launch every rank is asked. There is one report, and
the status is 1 if the ranks differ in something that must be equal. The program trains nothing. It
needs no GPU, no Transformer Engine and no Megatron.
"""

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from megatron_mdm.doctor import agreement
from megatron_mdm.doctor.agreement import gpus_in_words
from megatron_mdm.doctor.facts import CUDA, MEGATRON, PACKAGES, TORCH, Facts, collect
from megatron_mdm.doctor.features import FEATURES
from megatron_mdm.environment import prepare_environment, silent_import
from megatron_mdm.errors import UserError, check_numbers, escaped, exit_rank_with
from megatron_mdm.versions import TESTED

SECONDS = 120  # default of --timeout
TO_PARSE = (TORCH, MEGATRON, PACKAGES)  # without one of them flags cannot be parsed


@dataclass(frozen=True)
class Report:
    """The result of the program."""

    ranks: Sequence[Facts]
    flags: Sequence[str]
    """Flags of a launch, as given."""

    not_runnable: Sequence[str]
    """One line for each flag whose feature cannot run."""

    differences: Sequence[agreement.Difference]

    @property
    def status(self) -> int:
        """Exit status of the program."""
        return int(bool(self.not_runnable) or any(x.is_fault for x in self.differences))

    def as_json(self) -> dict[str, Any]:
        """The report as the JSON of --json."""
        facts = self.ranks[0]
        obstacles = {feature.name: feature.obstacle(facts) for feature in FEATURES}
        return {
            "versions": facts.versions,
            "tested": [asdict(tested) for tested in TESTED.values()],
            "untested": [name for name in TESTED if _is_untested(name, facts.versions[name])],
            "gpus": [asdict(gpu) for gpu in facts.gpus],
            "problems": facts.problems,
            "environment": facts.shown_environment,
            "features": [
                {"name": name, "can_run": line is None, "obstacle": line}
                for name, line in obstacles.items()
            ],
            "flags": list(self.flags),
            "flags_that_cannot_run": list(self.not_runnable),
            "ranks": len(self.ranks),
            "differences": [
                {"what": x.what, "must_be_equal": x.is_fault, "line": x.in_words(self.ranks)}
                for x in self.differences
            ],
            "status": self.status,
        }

    def lines(self) -> Iterator[str]:
        """The report as text."""
        facts = self.ranks[0]
        yield "Versions"
        for name, version in facts.versions.items():
            yield f"  {name:<22} {version or '-'}{_range(name, version)}"
        yield "GPUs"
        yield f"  {': '.join(filter(None, [gpus_in_words(facts), facts.problems.get(CUDA)]))}"
        if facts.shown_environment:
            yield "Environment"
            for name, value in facts.shown_environment.items():
                yield f"  {name}={value}"
        yield "Features"
        for feature in FEATURES:
            line = feature.obstacle(facts)
            yield f"  {'no ' if line else 'yes'} {feature.name}" + (f": {line}" if line else "")
        if self.flags:
            yield "Flags"
            fine = "the features above that they use can run here; the run checks the other flags"
            yield from (f"  {line}" for line in self.not_runnable or [fine])
        if len(self.ranks) > 1:
            yield f"{len(self.ranks)} ranks"
            for difference in self.differences:
                kind = "must be equal: " if difference.is_fault else "may differ: "
                yield f"  {kind}{difference.in_words(self.ranks)}"
            if not self.differences:
                yield "  agree in everything above"


def _is_untested(name: str, version: str | None) -> bool:
    return name in TESTED and version is not None and not TESTED[name].includes(version)


def _range(name: str, version: str | None) -> str:
    """The tested range of a package, in brackets; empty for a package without one."""
    if name not in TESTED:
        return ""
    word = TESTED[name].word
    if version is None:
        return f" ({word}: {TESTED[name]})"
    return f" (not tested; {word}: {TESTED[name]})" if _is_untested(name, version) else f" ({word})"


def _not_runnable(args: Namespace, ranks: Sequence[Facts]) -> list[str]:
    """One line for each flag of a launch whose feature cannot run on a rank, the first such one."""
    lines = []
    for feature in FEATURES:
        flag = feature.flag(args)
        found = ((facts, feature.obstacle(facts)) for facts in ranks) if flag else ()
        for facts, line in found:
            if line is not None:
                where = "here" if len(ranks) == 1 else f"on {facts.host}"
                lines.append(f"{flag} cannot run {where}: {line}")
                break
    return lines


def _parsed(flags: Sequence[str]) -> Namespace:
    """Flags of a launch, parsed by the program that they are for.

    Megatron is imported as in the CPU mode, because a broken Transformer Engine, which the report
    names, would make the import fail.

    Raises:
        UserError: a flag does not exist, or its value has another type.
    """
    prepare_environment("cpu")
    before, sys.argv = sys.argv, ["megatron_mdm.pretrain", *flags]
    try:
        with silent_import():
            from megatron_mdm.mcore.flags.arguments import parse_only
        return parse_only()
    except UserError as error:
        message = str(error).removesuffix(" (--help lists all flags)")  # ours lists other flags
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message = f"{unknown} is neither an option of the doctor nor a flag of a run"
        raise UserError(message) from error
    finally:
        sys.argv = before


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _options() -> tuple[Namespace, list[str]]:
    """The options of this program, and the flags of a launch."""
    parser = _Parser(
        prog="python -m megatron_mdm.doctor",
        usage="%(prog)s [--json] [--timeout N] [-- FLAGS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--timeout",
        type=int,
        default=SECONDS,
        metavar="N",
        help="seconds that a rank waits for the others. Default: %(default)s.",
    )
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options, flags = parser.parse_known_args(words[:end])  # torchrun does not pass -- on
    check_numbers(options, "timeout")
    return options, flags + words[end + 1 :]


def main() -> int:
    """Prints the report and returns the exit status."""
    options, flags = _options()
    facts = collect()
    args = None
    causes = [facts.problems[x] for x in TO_PARSE if x in facts.problems]
    if flags and not causes:
        args = _parsed(flags)
    is_alone = agreement.number_of_ranks() == 1 or TORCH in facts.problems
    ranks = [facts] if is_alone else agreement.gather(facts, options.timeout)
    status = 0
    if ranks is not None:
        if args is not None:
            not_runnable = _not_runnable(args, ranks)
        else:
            not_runnable = [f"these flags cannot run here: {x}" for x in causes if flags]
        report = Report(ranks, flags, not_runnable, agreement.differences(ranks))
        status = report.status
        if options.json:
            print(json.dumps(report.as_json(), indent=2), flush=True)
        else:
            print("\n".join(map(escaped, report.lines())), flush=True)
    return status if is_alone else agreement.share_status(status)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        exit_rank_with(error)
