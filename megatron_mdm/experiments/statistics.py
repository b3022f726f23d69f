"""Statistics of few repetitions: confidence intervals of means and deviations, and tests."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval; NaN if they are not defined."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean, with its confidence interval by Student's t.

    The interval is NaN for fewer than two values or if a value is not finite. The mean of no values
    is NaN.
    """
    from scipy.stats import t

    mean = sum(values) / len(values) if values else math.nan
    if len(values) < 2 or not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan)
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * _standard_error(values)
    return Interval(mean, mean - half, mean + half)


def t_test(values: Sequence[float]) -> float:
    """The two-sided p value of Student's t-test of the hypothesis that the mean is 0.

    NaN for fewer than two values, or if a value is not finite.
    """
    from scipy.stats import t

    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    mean, error = statistics.fmean(values), _standard_error(values)
    if error == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return float(2 * t.sf(abs(mean) / error, len(values) - 1))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p values of a family of tests, by name in the order given.

    A test is significant at a level if its adjusted p value is below it. This controls the
    family-wise error rate, whichever hypotheses are true. A NaN does not count as a test: it stays
    NaN and does not affect the others.
    """
    tests = sorted((name for name in p if not math.isnan(p[name])), key=lambda name: p[name])
    adjusted, largest = dict(p), 0.0
    for place, name in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - place) * p[name]))
        adjusted[name] = largest
    return adjusted


def deviation_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The standard deviation of at least two values, with its chi-square confidence interval."""
    from scipy.stats import chi2

    deviation, freedom = statistics.stdev(values), len(values) - 1
    low, high = (
        deviation * math.sqrt(freedom / float(chi2.ppf(share, freedom)))
        for share in ((1 + level) / 2, (1 - level) / 2)
    )
    return Interval(deviation, low, high)


def deviation_ratio(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """The standard deviation of a divided by that of b, with its confidence interval by F.

    Args:
        a: at least two values.
        b: at least two values that differ.
        level: confidence level.
    """
    from scipy.stats import f

    ratio = statistics.stdev(a) / statistics.stdev(b)
    low, high = (
        ratio / math.sqrt(float(f.ppf(share, len(a) - 1, len(b) - 1)))
        for share in ((1 + level) / 2, (1 - level) / 2)
    )
    return Interval(ratio, low, high)


def deviation_test(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sided p value of the F-test of the hypothesis that two standard deviations are equal.

    Args:
        a: at least two values.
        b: at least two values that differ.
    """
    from scipy.stats import f

    ratio = statistics.variance(a) / statistics.variance(b)
    freedom = len(a) - 1, len(b) - 1
    return 2 * min(float(f.cdf(ratio, *freedom)), float(f.sf(ratio, *freedom)))


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))
