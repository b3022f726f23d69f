"""Statistics of few repetitions, compared with printed tables and with scipy's own tests."""

import math

import pytest
from scipy import stats

from megatron_mdm.experiments.statistics import (
    Interval,
    deviation_interval,
    deviation_ratio,
    holm,
    mean_interval,
    t_test,
)

# Student's data of 1908: additional hours of sleep of ten patients, with one drug and with another.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
DIFFERENCES = [b - a for a, b in zip(FIRST, SECOND, strict=True)]


def test_a_mean_has_students_interval():
    assert mean_interval(DIFFERENCES) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-7)
    low, high = stats.ttest_1samp(FIRST, 0.0).confidence_interval(0.9)
    assert mean_interval(FIRST, level=0.9) == pytest.approx((0.75, low, high))


def test_of_one_value_nothing_is_known():
    value, low, high = mean_interval([2.5])
    assert value == 2.5 and math.isnan(low) and math.isnan(high)
    assert math.isnan(t_test([2.5]))


def test_students_test():
    assert t_test(DIFFERENCES) == pytest.approx(0.00283289, abs=1e-8)
    assert t_test([-x for x in DIFFERENCES]) == pytest.approx(0.00283289, abs=1e-8)
    assert t_test(FIRST) == pytest.approx(stats.ttest_1samp(FIRST, 0.0).pvalue)
    assert t_test([0.0, 0.0]) == 1.0 and t_test([1.0, 1.0]) == 0.0


def test_holm_adjusts_for_those_that_are_left():
    # The least p value counts four times, the next one three times. None is below the one before.
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert holm(p) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(holm(p)) == list(p)
    assert holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    found = holm({"a": 0.02, "b": math.nan})
    assert found["a"] == 0.02 and math.isnan(found["b"])
    assert holm({}) == {}


def test_a_deviation_has_the_interval_of_chi_square():
    # For ten values, printed tables have the factors 0.6878 and 1.8256.
    value, low, high = deviation_interval(FIRST)
    assert value == pytest.approx(1.789010, abs=1e-6)
    assert (low / value, high / value) == pytest.approx((0.6878, 1.8256), abs=1e-4)


@pytest.mark.parametrize(("n", "needed"), [(3, 6.245), (8, 2.235), (20, 1.589)])
def test_a_ratio_of_deviations_has_the_interval_of_f(n, needed):
    """With n values per side, a ratio must be this large for its interval to exclude 1."""
    a = [float(i) for i in range(n)]
    ratio, low, high = deviation_ratio([3 * x for x in a], a)
    assert ratio == pytest.approx(3.0)
    assert (ratio / low, high / ratio) == pytest.approx((needed, needed), abs=1e-3)
    inverse = deviation_ratio(a, [3 * x for x in a])
    assert inverse == pytest.approx(Interval(1 / ratio, 1 / high, 1 / low))
