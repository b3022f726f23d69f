"""A bell that fades into the uniform, followed by P-POTS, over stops and layouts.

The run has these phases: the initial bell (iterations 1 to 3), the fade (4 and 5), uniform rates
that P-POTS measures (6), and rates of its fits (after 6, 8 and 10).
"""

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_mdm.objective.bells import Bell
from megatron_mdm.objective.quantiles import Quantiles
from megatron_mdm.objective.randomness import Split, to_unit
from tests import ranks

FADE = [
    *"--mdm-rate-sampler logit-normal --mdm-logit-normal 0 0.5 --mdm-bell-fade 0.2 0.5".split(),
    *"--mdm-bell-uniform-share 0.01 --lr 1e-3 --save-interval 1".split(),
]
TAKEOVER = [
    *"--train-iters 10 --mdm-ppots-refit-interval 2 --mdm-ppots-bins 4".split(),
    *"--mdm-ppots-target gradient".split(),
]
# In samples: a step has 4 rows at first, and 8 from the 13th row on. Steps end at 4, 8, 12, 20, 28,
# 36.
SAMPLES = [
    *["--step-batch-size-schedule", "0:4 384:8"],
    *"--train-samples 36 --eval-global-batch-size 8".split(),
]
TP = ["--tensor-model-parallel-size", "2"]
PP = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
# The uniform share of each iteration until P-POTS has a fit, and that of each step of the run in
# samples, whose fade goes from sample 7 to 18.
SHARES = [0.01, 0.01, 0.01, 0.01 + 0.99 * (1 / 3), 0.01 + 0.99 * (2 / 3), 1.0]
STEPS = {0: 0.01, 4: 0.01, 8: 0.01 + 0.99 * (1 / 11), 12: 0.01 + 0.99 * (5 / 11), 20: 1.0, 28: 1.0}


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Whole runs on one rank, and runs from their checkpoints to the end or to a stop."""
    directory = tmp_path_factory.mktemp("fade")
    data, load = base[: base.index("--load")], base[base.index("--load") :]
    drop = ["--global-batch-size", "--train-iters"]
    batch = ["--global-batch-size", "8"]
    takes_over, in_samples = [*data, *FADE, *batch, *TAKEOVER], [*data, *FADE, *SAMPLES]

    def go_on(whole, step, *more):
        return ["--load", str(directory / f"{whole}_ckpt"), "--ckpt-step", str(step), *more]

    wholes = {
        name: (1, [*flags, *load, "--save", str(directory / f"{name}_ckpt")])
        for name, flags in (("iters", takes_over), ("samples", in_samples))
    }
    found: dict = {"checkpoint": directory / "iters_ckpt"}
    found |= ranks.launch_layouts(directory, wholes, drop=drop)
    longer = "--train-iters 20 --exit-interval 7 --override-opt_param-scheduler".split()
    parts = {
        **{f"from {k}": (1, [*takes_over, *go_on("iters", k)]) for k in (1, 3, 5, 7)},
        "TP from 1": (2, [*takes_over, *TP, *go_on("iters", 1, "--exit-interval", "7")]),
        "PP from 4": (2, [*takes_over, *PP, *go_on("iters", 4)]),
        "longer": (2, [*takes_over, *go_on("iters", 2), *longer]),
        "samples TP from 2": (2, [*in_samples, *TP, *go_on("samples", 2)]),
    }
    return found | ranks.launch_layouts(directory, parts, drop=drop)


def training(run, rows=range(1000)):
    """Rates and masks of the training rows."""
    return {key: x for key, x in run.masks().items() if key[0] == Split.TRAIN and key[1] in rows}


def expected_rate(row, share):
    """The rate of a row under the bell with this share."""
    quantile = Quantiles("lattice", 1234, Split.TRAIN)(row)
    bell = Bell.of("logit-normal", [0.0, 0.5], share=share)
    return bell(to_unit(torch.tensor([quantile])))[0].item()


def test_every_iteration_has_the_share_of_its_own(runs):
    found = training(runs["iters"])
    for row in range(48):
        assert found[Split.TRAIN, row][0] == expected_rate(row, SHARES[row // 8])
    found = training(runs["samples"])
    assert len(found) == 36
    for row in range(36):
        share = STEPS[max(first for first in STEPS if first <= row)]
        assert found[Split.TRAIN, row][0] == expected_rate(row, share)


def test_p_pots_measures_from_the_end_of_the_fade(runs):
    """The first fit uses only the 8 rows of iteration 6."""
    assert re.search(r"P-POTS refit at iteration 6 \| \w+ of 8 rows", runs["iters"].output[0])
    assert "P-POTS keeps" not in runs["iters"].output[0]


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_a_stop_in_each_phase_changes_no_bit(runs, step):
    whole, part = runs["iters"], runs[f"from {step}"]
    assert part.losses == whole.losses[step:]
    assert part.grad_norms == whole.grad_norms[step:]
    assert training(part) == training(whole, range(8 * step, 80))
    for name in ("mdm/controlled loss", "mdm/is bound", "mdm/uniform share"):
        assert part.scalars[name] == whole.scalars[name][step:], name
    density = "mdm/density at t 0.05"
    assert len(whole.scalars[density]) == 3  # after 6, 8 and 10, none in the bell's iterations
    assert part.scalars[density] == whole.scalars[density][-len(part.scalars[density]) :]


def test_other_layouts_go_on_with_the_same_bell(runs):
    """Rows are equal bit for bit until a fit, because layouts round the losses that it sees."""
    whole = runs["iters"]
    for name, step, last in (("TP from 1", 1, 7), ("PP from 4", 4, 10), ("longer", 2, 7)):
        part = runs[name]
        assert training(part, range(48)) == training(whole, range(8 * step, 48)), name
        assert part.losses == pytest.approx(whole.losses[step:last], rel=1e-4), name
        for scalar in ("mdm/controlled loss", "mdm/is bound", "mdm/uniform share"):
            expected = pytest.approx(whole.scalars[scalar][step:last], rel=1e-3)
            assert part.scalars[scalar] == expected, (name, scalar)
        rates, found = training(whole), training(part)
        assert len(found) == 8 * (last - step)
        assert [t for t, _ in found.values()] == pytest.approx(
            [rates[row][0] for row in found], rel=1e-3
        )


def test_a_fade_in_samples_goes_on_under_another_layout(runs):
    whole, part = runs["samples"], runs["samples TP from 2"]
    assert training(part) == training(whole, range(8, 36))
    assert part.losses == pytest.approx(whole.losses[2:], rel=1e-4)


def test_the_log_says_when_the_loss_is_a_bound(runs):
    """In samples, the rows finished before an iteration decide. P-POTS leaves the loss a bound."""
    for name, shares in (("iters", SHARES + [1.0] * 4), ("samples", list(STEPS.values()))):
        assert runs[name].scalars["mdm/uniform share"] == pytest.approx(shares)
        assert runs[name].scalars["mdm/is bound"] == [share == 1.0 for share in shares]


def test_the_log_says_when_the_bell_fades(runs):
    line = "the bell of --mdm-rate-sampler logit-normal fades between {} of the run"
    for name in ("iters", "from 1", "longer"):
        assert line.format("2 and 5 iterations") in runs[name].output[0]
    assert line.format("7 and 18 samples") in runs["samples"].output[0]


def test_tools_take_its_checkpoints(runs, data, tmp_path):
    """Tools measure with rates of their own; so do the methods of the report."""
    where = ["--device", "cpu", "--load", str(runs["checkpoint"]), "--data", str(data)]
    report = ["--output", str(tmp_path / "report.json"), "--parameters", "output_layer"]
    report += "--rows 20 --batch 4 --methods standard flat bell".split()
    fit = ["--output", str(tmp_path / "ppots.json")]
    fit += "--rates 4 --rows 4 --masks 2 --family piecewise".split()
    tools = {"evaluate": ["--rows", "8"], "fit_ppots": fit, "variance_report": report}
    printed = {}
    for name, flags in tools.items():
        run = ranks.run_forked(f"tools/{name}.py", *where, *flags)
        assert run.returncode == 0, run.stderr[-2000:]
        printed[name] = run.stdout
    assert "NELBO" in printed["evaluate"] and "piecewise" in printed["fit_ppots"]
    rows = {row["method"]: row for row in json.loads(Path(report[1]).read_text())["methods"]}
    assert [row["unbiased"] for row in rows.values()] == [True, False, False]
    assert rows["bell"]["loss"][0] < 1  # it draws no rates of high variance
