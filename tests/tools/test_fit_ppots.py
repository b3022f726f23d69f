"""tools/fit_ppots.py: its fit to a checkpoint, its flags, and its data."""

import json
import math
import runpy
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.objective.ppots.fit import fit
from megatron_mdm.objective.ppots.moments import RateMoments
from megatron_mdm.pictures import blank_figure
from tests import ROOT, ranks, shown
from tests.ranks import entries


@pytest.fixture(scope="module")
def density(base, tmp_path_factory):
    """The file of a density that the tool, started as users do, fitted to the base checkpoint."""
    path = tmp_path_factory.mktemp("fit") / "ppots.json"
    flags = "--target gradient --rates 8 --rows 4 --masks 4 --family piecewise".split()
    where = ["--device", "cpu", "--load", base[base.index("--load") + 1], "--output", str(path)]
    printed = ranks.run_tool("fit_ppots", *where, *flags)
    assert "gradient over 128 draws" in printed
    assert "standard error of the second moment: " in printed and "% at most, for t in (" in printed
    assert path.with_suffix(".png").stat().st_size > 1000
    return path


def test_fits_of_a_checkpoint_on_two_ranks(base, density, tmp_path):
    tool = ["--", "tools/fit_ppots.py", "--device", "cpu", "--load", base[base.index("--load") + 1]]
    tool += "--target gradient --rates 8 --rows 4 --masks 4 --family piecewise".split()
    output = tmp_path / "two.json"
    ranks.launch(tmp_path, 2, *tool, "--output", str(output), entry=entries.tool)
    one, two = (json.loads(path.read_text()) for path in (density, output))
    assert two["moments"] == pytest.approx(one["moments"], rel=1e-5)
    assert two["density"] == pytest.approx(one["density"], rel=1e-5)
    assert len(one["errors"]) == 8 and min(one["errors"]) > 0.0
    assert two["errors"] == pytest.approx(one["errors"], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rows 0", "--rates, --rows and --masks must be at least 1"),
        ("--rates 5000", "--rates 5000: at most 1022"),
        ("--uniform-share 0", "--uniform-share must lie in (0, 1], got 0.0"),
        ("--rates 3 --family epr", "--family epr has 7 parameters; take more rates or"),
        ("--rates 4 --family power", "--family power has 5 parameters"),
        ("--output x.png", "--output x.png: .png is the picture's suffix"),
        ("--output nowhere/x.json", "--output nowhere/x.json cannot be written"),
        ("--output y.json", "--output: its picture y.png needs matplotlib: pip install"),
    ],
)
def test_flags_of_fits_are_checked_before_anything_is_measured(flags, message, monkeypatch):
    if "matplotlib" in message:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    tool = runpy.run_path(str(ROOT / "tools/fit_ppots.py"))
    argv = ["fit_ppots", "--load", "nothing", "--output", "x.json", *flags.split()]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError) as caught:
        tool["check"](tool["parse"]())
    assert message in str(caught.value)


def test_data_given_to_the_tool_take_the_place_of_the_runs(monkeypatch):
    tool = runpy.run_path(str(ROOT / "tools/fit_ppots.py"))
    words = "--load x --output x.json --data-path pairs --mdm-sft --no-mdm-eod-eligible".split()
    monkeypatch.setattr(sys, "argv", ["fit_ppots", *words])
    args = Namespace(**MDMConfig(random_length_fraction=0.01).arguments())
    args.data_path, args.mock_data, args.train_data_path = None, True, ["elsewhere"]
    args.split, args.data_cache_path = None, "/of/another/machine"
    tool["take_over"](tool["parse"](), args)
    assert (args.data_path, args.mock_data, args.train_data_path) == (["pairs"], False, None)
    assert (args.split, args.data_cache_path) == ("100,0,0", None)
    # Rows of pairs have no random length.
    assert (args.mdm_sft, args.mdm_random_length_fraction) == (True, 0.0)
    monkeypatch.setattr(sys, "argv", ["fit_ppots", *words[:4], "--mdm-rate-per", "document"])
    with pytest.raises(UserError, match="--mdm-rate-per document with --mdm-sft needs"):
        tool["take_over"](tool["parse"](), args)
    # Settings of fine-tuning alone are dropped, and so is ISAD, whose masks are not measured.
    of_pairs = MDMConfig(sft=True, syrm_fraction=0.5, isad_token_ids=[1])
    args = Namespace(**of_pairs.arguments())
    words = [*words[:4], "--no-mdm-sft", "--mdm-mask", "exact-count"]
    monkeypatch.setattr(sys, "argv", ["fit_ppots", *words])
    tool["take_over"](tool["parse"](), args)
    assert (args.mdm_sft, args.mdm_syrm_fraction, args.mdm_mask) == (False, 0.0, "exact-count")


@pytest.mark.parametrize("errors", [None, 0.02, 2.0])
@pytest.mark.parametrize("uniform_share", [0.1, 1.0])
def test_the_picture_compares_means_over_bins_on_logarithmic_axes(errors, uniform_share):
    """The square is 1/t^1.6: its mean over the first of five bins is far from its central value."""
    tool = runpy.run_path(str(ROOT / "tools/fit_ppots.py"))
    t = (np.arange(5000) + 0.5) / 5000
    moments = RateMoments(5)
    moments.update(t, (t + 0.001) ** -0.8, np.ones_like(t))
    square = moments.second_moment()
    found = None if errors is None else errors * square
    result = fit(moments, family="power", uniform_share=uniform_share, errors=found)
    with blank_figure() as figure:
        tool["fill"](figure, result)
        shown.check_panels(figure)
        (axes,) = figure.axes
        assert axes.get_xscale() == axes.get_yscale() == "log"
        (points,) = axes.containers
        measured = points[0].get_xydata()
        root = np.sqrt(square) / np.sqrt(square).mean()
        assert measured == pytest.approx(np.stack([(np.arange(5) + 0.5) / 5, root], axis=1))
        assert shown.inside(axes, measured).all()
        if errors is None:
            assert len(points[2]) == 0
        else:
            low, high = np.array([bar[:, 1] for bar in points[2][0].get_segments()]).T
            assert high == pytest.approx(root * math.sqrt(1 + 2 * errors))
            assert low == pytest.approx(root * math.sqrt(max(0.0, 1 - 2 * errors)))
        if uniform_share < 1.0:
            # The fit knows the form of the square, so it matches the measured means of bins.
            (stairs,) = axes.patches
            assert stairs.get_data().values == pytest.approx(root, rel=0.02)
        else:
            assert not axes.patches


MEMORY = """
import resource, runpy, sys
from megatron_mdm.environment import prepare_environment
prepare_environment("cpu")
import matplotlib.pyplot, megatron_mdm.mcore.inference.measure
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
print("bytes:", peak() - before)
"""


def test_memory_does_not_grow_with_the_draws(tmp_path):
    """Over 94 calls, the logits take up to 16 MiB, with a different size each time.

    When they were freed into glibc's heap, the heap grew to 1.6 GB.
    """
    rows = "--seq-length 256 --max-position-embeddings 256 --mock-data --train-iters 1"
    sizes = "--num-layers 1 --vocab-size 1000 --mdm-mask-token-id 1001"
    saved = ["--save", str(tmp_path / "checkpoint"), "--save-interval", "1"]
    ranks.launch(tmp_path, 1, *rows.split(), *sizes.split(), *saved)
    flags = ["--load", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "x.json")]
    flags += "--device cpu --target gradient --rates 30 --rows 5 --masks 10".split()
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, "tools/fit_ppots.py", *flags],
        cwd=ROOT, env=ranks.users_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout.split("bytes:")[1]) < 400e6
