"""Turns the results of all runs into tables, answers to the paper's claims, and Markdown.

Runs are compared if they have the same base model and texts (a `Setting`), seed by seed. The
interval of the mean difference is Student's. A method *gains* or *loses* if the p value, adjusted
by Holm's method over all methods of the setting, is below 5%; otherwise there is no clear
difference. The autoregressive network is not a masked-diffusion method and has no verdict.
Intervals of standard deviations come from the chi-square distribution, and intervals of their
ratios from the F distribution, as if the two groups were independent. All intervals are 95%
intervals.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from methods import (
    BOTH,
    BOTH_EPOCHS,
    DOUBLED,
    METHODS,
    SCALES,
    SCARCE,
    STOPPED,
    Setting,
)
from score import from_hex

from megatron_mdm.experiments import pages
from megatron_mdm.experiments.statistics import (
    Interval,
    deviation_interval,
    deviation_ratio,
    deviation_test,
    holm,
    mean_interval,
    t_test,
)

Result = dict[str, Any]
Entries = dict[str, list[Result]]
MOMENTS = ("start", "middle", "end")
LEVEL = 0.05
NEAR = 2.0  # largest difference of mean answers, in points, at which deviations are compared
WIDTH = 42  # width of the first column


def by_setting(results: Result) -> dict[Setting, Entries]:
    """Groups runs by setting and method, in the order of the scale and of the seeds."""
    found: dict[Setting, Entries] = {}
    for setting, methods in SCALES[results["scale"]].entries.items():
        own = [run for run in results["runs"] if setting_of(run) == setting]
        entries = {name: [run for run in own if run["method"] == name] for name in methods}
        entries = {name: runs for name, runs in entries.items() if runs}
        if entries:
            found[setting] = entries
    return found


def setting_of(run: Result) -> Setting:
    """Returns the setting of a run."""
    return Setting(run["task"], run["regime"], run["base"])


def answers(runs: Sequence[Result]) -> list[float]:
    """Returns the right answers of each run in percent."""
    return [100 * run["answers"] for run in runs]


def differences(
    runs: Sequence[Result], baseline: Sequence[Result], key: str = "answers"
) -> list[float]:
    """Returns the difference of each run from the baseline's run of the same seed, if it exists."""
    base = {run["seed"]: run[key] for run in baseline}
    return [run[key] - base[run["seed"]] for run in runs if run["seed"] in base]


def verdicts(entries: Entries, baseline: str = "standard") -> dict[str, str]:
    """Returns the verdict on each masked-diffusion method's answers against the baseline's."""
    values = {
        name: differences(runs, entries.get(baseline, []))
        for name, runs in entries.items()
        if name != baseline and not METHODS[name].causal
    }
    adjusted = holm({name: t_test(found) for name, found in values.items() if found})
    words = {}
    for name, p in adjusted.items():
        clear = p < LEVEL
        rises = statistics.fmean(values[name]) > 0
        words[name] = ("gains" if rises else "loses") if clear else "no clear difference"
    return words


def smoke_test(results: Result) -> str:
    """Returns a warning if the results are those of a smoke test, else an empty text."""
    scale = results["scale"]
    if not SCALES[scale].is_smoke_test:
        return ""
    return (
        f"--scale {scale} is a smoke test: it shows that everything runs, and says nothing about "
        "methods"
    )


def as_text(results: Result) -> str:
    """Returns all tables as text."""
    blocks = []
    found = by_setting(results)
    for setting in SCALES[results["scale"]].entries:
        entries = found.get(setting)
        if entries is None:
            blocks.append([f"== {setting.title} ==", *_notes(results, setting)])
            continue
        blocks += [
            [*_means(results, setting, entries), *_notes(results, setting)],
            _less(entries, "standard"),
            _less(entries, DOUBLED),
            _deviations(entries),
            _seeds(entries),
            _parts(entries),
            _noise(entries),
        ]
    text = "\n\n".join("\n".join(lines) for lines in blocks if len(lines) > 1)
    return "\n\n".join(filter(None, (smoke_test(results), text)))


def _means(results: Result, setting: Setting, entries: Entries) -> list[str]:
    texts = SCALES[results["scale"]].pairs[setting.regime]
    head = f"== {setting.title}, {texts} texts =="
    lines = [
        head,
        f"{'':{WIDTH}s}{'answers':>9s}{'all right':>11s}{'unseen':>9s}{'NELBO':>9s}{'steps':>7s}"
        f"{'rows':>8s}"
        f"{'epochs':>8s}{'seeds':>7s}",
    ]
    for name, runs in entries.items():
        means = (statistics.fmean(run[key] for run in runs) for key in ("answers", "solutions"))
        shares = "".join(f"{mean:>{width}.1%}" for mean, width in zip(means, (9, 11), strict=True))
        lines.append(
            f"{name:{WIDTH}s}{shares}{_unseen(runs):>9s}"
            f"{statistics.fmean(run['nelbo'] for run in runs):9.4f}"
            f"{runs[0]['steps']:7d}{runs[0]['rows']:8d}{runs[0]['texts'] / texts:8.2f}"
            f"{len(runs):7d}"
        )
    return lines


def _unseen(runs: Sequence[Result]) -> str:
    """Returns the share of right answers on problems whose response is in no training text."""
    count = sum(run["unseen"] for run in runs)
    return f"{sum(run['unseen_right'] for run in runs) / count:.1%}" if count else "none"


def _notes(results: Result, setting: Setting) -> list[str]:
    """Returns notes on a setting's runs: missing runs, and where the network was stopped."""

    def own(name: str) -> list[Result]:
        return [one for one in results[name] if setting_of(one) == setting]

    return [
        *map(closed, own("closed")),
        *(f"{one['method']}, seed {one['seed']}: {one['diverged']}" for one in own("diverged")),
        *(f"{STOPPED}: {stop(one)}" for one in own("stopped")),
    ]


def closed(one: Result) -> str:
    """Returns the reason why the other runs of a setting are not done."""
    least, most = one["accepts"]
    return (
        f"{setting_of(one).title}: the first run of `standard` solves {one['answers']:.1%}, which "
        f"is not within {least:.0%} to {most:.0%}, and the other runs are not begun"
    )


def stop(one: Result) -> str:
    """Describes where the autoregressive network was stopped, and both networks' slopes there."""
    miss = 100 * (one["reached"] - one["target"])
    slopes = one["slopes"]
    return (
        f"after {one['steps']} steps, where it solves {one['reached']:.1%} and `standard` "
        f"{one['target']:.1%} in calibration ({miss:+.1f} points"
        f"{': the target is missed' if abs(miss) > NEAR else ''}); 25% more steps change it by "
        f"{100 * slopes['autoregressive']:+.1f} points and `standard` by "
        f"{100 * slopes['standard']:+.1f}"
    )


def _less(entries: Entries, baseline: str) -> list[str]:
    words, base = verdicts(entries, baseline), entries.get(baseline, [])
    lines = [
        f"{'minus ' + baseline:{WIDTH}s}{'answers':>22s}{'all right':>22s}{'NELBO':>27s}"
        "  verdict on answers"
    ]
    for name, runs in entries.items():
        if name == baseline or not differences(runs, base):
            continue
        cells = [
            points(differences(runs, base)),
            points(differences(runs, base, "solutions")),
            with_ends(mean_interval(differences(runs, base, "nelbo")), "+.4f"),
        ]
        line = f"{name:{WIDTH}s}{cells[0]:>22s}{cells[1]:>22s}{cells[2]:>27s}  "
        lines.append((line + words.get(name, "")).rstrip())
    return lines


def _deviations(entries: Entries) -> list[str]:
    lines = [
        f"{'spread of the answers, points':{WIDTH}s}{'deviation':>20s}{'of the runs':>13s}"
        f"{'max - min':>11s}{'/ that of standard':>22s}{'seeds':>7s}"
    ]
    for name, runs in entries.items():
        if len(runs) < 2:
            continue
        deviation = with_ends(deviation_interval(answers(runs)), ".2f")
        ratio = ratio_of(entries, name, "standard") if name != "standard" else None
        lines.append(
            f"{name:{WIDTH}s}{deviation:>20s}{deviation_of_runs(runs):13.2f}"
            f"{max(answers(runs)) - min(answers(runs)):11.1f}"
            f"{with_ends(ratio, '.2f') if ratio else '':>22s}{len(runs):7d}"
        )
    return lines


def deviation_of_runs(runs: Sequence[Result]) -> float:
    """Estimates the deviation of answers between runs, without the noise of the choice of problems.

    The result is in percentage points. The accuracies on two halves of the problems share only the
    deviation of the runs, so their covariance over the seeds is its square. Averaged over all ways
    to halve, this is the mean covariance of two problems. A negative covariance gives 0.
    """
    right = np.array([from_hex(run["right"], run["problems"]) for run in runs], dtype=float)
    count = right.shape[1]
    own = right.var(axis=0, ddof=1).sum()
    covariance = (right.sum(axis=1).var(ddof=1) - own) / (count * (count - 1))
    return 100 * math.sqrt(max(0.0, covariance))


def ratio_of(entries: Entries, name: str, baseline: str) -> Interval | None:
    """Returns the ratio of two methods' deviations; None if one of them is not known."""
    a, b = (answers(entries.get(entry, [])) for entry in (name, baseline))
    if min(len(a), len(b)) < 2 or len(set(b)) < 2:
        return None
    return deviation_ratio(a, b)


def _seeds(entries: Entries) -> list[str]:
    seeds = list(dict.fromkeys(run["seed"] for runs in entries.values() for run in runs))
    lines = [f"{'answers of each seed, %':{WIDTH}s}" + "".join(f"{seed:6d}" for seed in seeds)]
    for name, runs in entries.items():
        own = {run["seed"]: run for run in runs}
        cells = (f"{100 * own[s]['answers']:6.1f}" if s in own else f"{'':6s}" for s in seeds)
        lines.append(f"{name:{WIDTH}s}{''.join(cells)}".rstrip())
    return lines


def measured(entries: Entries) -> list[Result]:
    """Returns the measurements during the runs of `standard`, one for each measured seed."""
    return [run["moments"] for run in entries.get("standard", []) if "moments" in run]


def parts(entries: Entries, what: str, moment: str) -> dict[str, Interval]:
    """Returns A, B and C as shares of one row's variance of `loss` or `gradient`, over seeds."""
    found = [moments[moment][what] for moments in measured(entries)]
    return {
        part: mean_interval([one[part][0] / one["total"][0] for one in found]) for part in "ABC"
    }


def _parts(entries: Entries) -> list[str]:
    if not measured(entries):
        return []
    lines = [
        f"{'shares of the variance of one row':{WIDTH}s}" + "".join(f"{p:>22s}" for p in "ABC")
    ]
    for what in ("loss", "gradient"):
        for moment in MOMENTS:
            cells = (with_ends(x, ".2f") for x in parts(entries, what, moment).values())
            lines.append(
                f"{f'{what}, {moment}':{WIDTH}s}" + "".join(f"{cell:>22s}" for cell in cells)
            )
    return lines


def noise(entries: Entries, moment: str) -> dict[str, Interval]:
    """Returns a batch gradient's variance relative to `standard`, as geometric mean over seeds."""
    found = [moments[moment]["noise"] for moments in measured(entries)]
    names = found[0] if found else ()
    return {
        f"{name}{' (another loss)' if METHODS[name].has_own_loss else ''}": _exponential(
            mean_interval([math.log(one[name] / one["standard"]) for one in found])
        )
        for name in names
    }


def _exponential(interval: Interval) -> Interval:
    return Interval(*map(math.exp, interval))


def _noise(entries: Entries) -> list[str]:
    by_moment = {moment: noise(entries, moment) for moment in MOMENTS}
    lines = [
        f"{'variance of a gradient / standard':{WIDTH}s}" + "".join(f"{m:>22s}" for m in MOMENTS)
    ]
    for name in by_moment["end"]:
        cells = (with_ends(found[name], ".2f") for found in by_moment.values())
        lines.append(f"{name:{WIDTH}s}" + "".join(f"{cell:>22s}" for cell in cells))
    return lines


def with_ends(interval: Interval, form: str) -> str:
    """Formats an interval ("+.1f", say) with its ends in brackets, or without unknown ends."""
    value = f"{interval.value:{form}}"
    if math.isnan(interval.low):
        return value
    return f"{value} [{interval.low:{form}}, {interval.high:{form}}]"


def points(shares: Sequence[float]) -> str:
    """Formats the mean difference of shares in percentage points, with its interval."""
    return with_ends(mean_interval([100 * share for share in shares]), "+.1f")


def claims(results: Result) -> str:
    """Answers the paper's two claims in sentences with numbers and intervals."""
    if smoke_test(results):
        return f"The paper's claims are not judged: {smoke_test(results)}."
    found = by_setting(results)
    lines = ["Does P-POTS + MIRROR gain accuracy? Points of right answers, with 95% intervals:", ""]
    for setting, entries in found.items():
        said = [
            gain and f"{gain} {how}"
            for name, baseline, how in (
                (BOTH_EPOCHS, "standard", "at equal epochs, of twice the rows"),
                (BOTH, "standard", "at equal compute, of half of the epochs"),
                (BOTH_EPOCHS, DOUBLED, f"at equal compute to `{DOUBLED}`, of twice the epochs"),
            )
            if (gain := _gain(entries, name, baseline))
        ]
        if said:
            lines.append(f"- {setting.title}: {'; '.join(said)}.")
    lines += ["", SPREAD, "", *(_spread(found.get(SCARCE, {})) or ["- not run."])]
    lines += [
        f"- {STOPPED}: {stop(one)}." for one in results["stopped"] if setting_of(one) == SCARCE
    ]
    return "\n".join(lines)


SPREAD = (
    "Is its spread near the autoregressive network's and below `standard`'s? Ratios of deviations "
    "over seeds from one base, the autoregressive network stopped where it solves as much as "
    "`standard`:"
)
SPREADS = (
    *((name, baseline) for name in (BOTH_EPOCHS, BOTH) for baseline in ("standard", STOPPED)),
    (STOPPED, "standard"),
)


def _spread(entries: Entries) -> list[str]:
    """Returns a sentence on each ratio of deviations; Holm's method adjusts all tests together."""
    ratios = {pair: ratio for pair in SPREADS if (ratio := ratio_of(entries, *pair)) is not None}
    means = {name: statistics.fmean(answers(runs)) for name, runs in entries.items()}
    near = [(a, b) for a, b in ratios if abs(means[a] - means[b]) <= NEAR]
    values = {pair: [answers(entries[name]) for name in pair] for pair in near}
    adjusted = holm({" / ".join(pair): deviation_test(*values[pair]) for pair in near})
    lines = []
    for (name, baseline), ratio in ratios.items():
        p = adjusted.get(f"{name} / {baseline}")
        if p is None:
            said = f"not compared: they solve {means[name]:.1f}% and {means[baseline]:.1f}%"
        else:
            unclear = f"cannot be told apart within a factor of {ratio.value / ratio.low:.2f}"
            said = f"{with_ends(ratio, '.2f')}: {'they differ' if p < LEVEL else unclear}"
        lines.append(f"- {name} / {baseline}: {said}.")
    return lines


def _gain(entries: Entries, name: str, baseline: str) -> str:
    values = differences(entries.get(name, []), entries.get(baseline, []))
    return f"{points(values)} ({verdicts(entries, baseline)[name]})" if values else ""


def as_markdown(results: Result) -> str:
    """Returns one table with the main results."""
    lines = [f"**{warning}.**", ""] if (warning := smoke_test(results)) else []
    lines += ["| | answers | minus `standard`'s | deviation, max - min |", "|---|---|---|---|"]
    for setting, entries in by_setting(results).items():
        lines.append(f"| **{setting.title}** | | | |")
        words = verdicts(entries)
        for name, runs in entries.items():
            values = [] if name == "standard" else differences(runs, entries.get("standard", []))
            less = points(values) if values else ""
            less += f": {words[name]}" if name in words else ""
            spread = "-"
            if len(runs) > 1:
                deviation = with_ends(deviation_interval(answers(runs)), ".1f")
                spread = f"{deviation}, {max(answers(runs)) - min(answers(runs)):.1f}"
            lines.append(f"| {name} | {statistics.fmean(answers(runs)):.1f}% | {less} | {spread} |")
    return "\n".join(lines)


def caption(results: Result) -> str:
    """Describes the origin of the results: scale, machine, date, program and number of runs."""
    done = results["runs"]
    wanted = sum(sum(m.values()) for m in SCALES[results["scale"]].entries.values())
    missing = f" ({wanted - len(done)} more have not been run)" if wanted > len(done) else ""
    hours = sum(run["seconds"] for run in done) / 3600
    return (
        f"`--scale {results['scale']}`, {done[0]['problems']} problems, {results['machine']}, "
        f"{results['date']}, {results['program']}; {len(done)} fine-tunings{missing} of "
        f"{hours:.1f} hours in all, {results['jobs']} at a time; bases and calibration are not "
        "counted." + (f" {warning}." if (warning := smoke_test(results)) else "")
    )


BLOCKS: Mapping[str, Callable[[Result], str]] = {
    "caption": caption,
    "claims": claims,
    "summary": as_markdown,
    "tables": lambda results: f"```text\n{as_text(results)}\n```",
}


def insert(results: Result, path: str) -> None:
    """Inserts results at the markers `reproduce` of a file; see `experiments.pages.insert`."""
    pages.insert(path, "reproduce", blocks(results))


def blocks(results: Result) -> dict[str, Callable[[], str]]:
    """Returns, for each marker, the function that makes its Markdown."""
    return {name: partial(make, results) for name, make in BLOCKS.items()}
