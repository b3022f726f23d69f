"""The common style of pictures: plain numbers, and axes whose scale ignores outliers."""

import math

import matplotlib
import pytest

from megatron_mdm.pictures import STYLE, blank_figure, limits, plain, point_out, use_log_scale


def test_numbers_are_written_in_full_where_that_is_short():
    found = [plain(x) for x in (0.0, 100_000.0, 1.0, 0.5, 0.1 + 0.2, -0.25, 0.0003, 2e-6, 1.75e-6)]
    assert found == ["0", "100000", "1", "0.5", "0.3", "-0.25", "0.0003", "2e-6", "1.75e-6"]


def test_a_number_that_rounds_to_the_least_decimal_one_is_written_like_it():
    assert [plain(x) for x in (1e-4 - 1e-17, -1e-4 + 1e-17, 9.9e-5)] == [
        "0.0001",
        "-0.0001",
        "9.9e-5",
    ]


def test_an_axis_leaves_outliers_out_and_nothing_else():
    low, high = limits([1.0, 2.0, 3.0, 4.0, 5.0])
    assert 0 < low < 1 and 5 < high < 6
    low, high = limits([1.0, 2.0, 3.0, 4.0, 1000.0])
    assert 0 < low < 1 and 4 < high < 5
    low, high = limits([7.0])
    assert low < 7 < high
    low, high = limits([1.0, 1.0, 1.0, 1.0, 9.0])  # the quartiles are equal
    assert low < 1 and high > 9


def test_outliers_are_written_at_their_edge():
    with blank_figure() as figure:
        axes = figure.add_subplot()
        axes.set_xlim(0, 10)
        point_out(axes, [5.0, math.nan], 0.5, "black")
        assert not axes.texts and not axes.lines
        point_out(axes, [5.0, 30.0, 20.0, -1.0, math.inf], 0.5, "black")
        assert [text.get_text() for text in axes.texts] == ["-1.0", "20.0 to inf"]
        assert [line.get_marker() for line in axes.lines] == ["<", ">"]


@pytest.mark.parametrize("values", [(0.9, 1.1), (0.2, 3.0), (1e-4, 1e4)])
def test_a_logarithmic_axis_has_several_plain_numbers(values):
    with blank_figure() as figure:
        axes = figure.add_subplot()
        axes.plot(values)
        use_log_scale(axes.yaxis)
        figure.canvas.draw()
        low, high = axes.get_ylim()
        words = [
            label.get_text()
            for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
            if low <= place <= high
        ]
        assert len(words) >= 3 and all(float(word) > 0 and "$" not in word for word in words)


def test_a_users_own_style_has_no_part_and_comes_back():
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 30.0}):
        with blank_figure() as figure:
            assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
            assert matplotlib.rcParams["font.size"] == STYLE["font.size"]
        assert matplotlib.rcParams["font.size"] == 30.0
