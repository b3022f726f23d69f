"""Views, densities of t and ISAD through the program: layouts, resume, and a fitted density."""

import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.sampler_state import OnlineSampler
from megatron_mdm.objective.randomness import Split
from tests import ranks

ISAD = ["--mdm-isad-token-ids", "10", "11", "12", "--mdm-isad-weight", "exact"]


@pytest.fixture(scope="module")
def density(base, tmp_path_factory):
    """A density fitted to the base checkpoint by the tool."""
    path = tmp_path_factory.mktemp("fit") / "ppots.json"
    command = [sys.executable, "tools/fit_ppots.py", "--device", "cpu", "--output", str(path)]
    command += ["--load", base[base.index("--load") + 1], "--target", "gradient"]
    command += ["--rates", "8", "--rows", "4", "--masks", "4", "--family", "piecewise"]
    result = subprocess.run(
        command, cwd=ranks.Path(__file__).parents[2], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "gradient over 128 draws" in result.stdout
    assert path.with_suffix(".png").stat().st_size > 1000
    return path


@pytest.fixture(scope="module")
def runs(base, density, tmp_path_factory):
    """Everything at once, under four layouts."""
    methods = ["--mdm-rate-sampler", "ppots", "--mdm-ppots-file", str(density)]
    methods += ["--mdm-mask", "exact-count", "--mdm-views", "2", "--train-iters", "3"]
    layouts = {
        "1 rank": (1, "--micro-batch-size 4"),
        "DP 2": (2, ""),
        "TP 2 + SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        "PP 2 x VP 2": (
            2,
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        ),
    }
    return {
        name: ranks.launch(
            tmp_path_factory.mktemp("methods"), count, *base, *methods, *flags.split()
        )
        for name, (count, flags) in layouts.items()
    }


@pytest.mark.parametrize("layout", ["DP 2", "TP 2 + SP", "PP 2 x VP 2"])
def test_all_methods_at_once_are_equal_under_every_layout(runs, layout):
    run, reference = runs[layout], runs["1 rank"]
    assert run.masks() == reference.masks()
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
    assert run.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)


def test_pairs_share_text_and_rate_and_mask_complements(runs):
    rows = {row: value for (split, row), value in runs["1 rank"].masks().items() if not split}
    assert len(rows) == 24
    for i in range(0, 24, 2):
        (t, first), (other_t, second) = rows[i], rows[i + 1]
        assert t == other_t
        masked = [
            {j for j, x in enumerate(tokens) if x == ranks.MASK_ID} for tokens in (first, second)
        ]
        k = int(np.ceil(t * 32))
        assert len(masked[0]) == len(masked[1]) == k
        assert len(masked[0] & masked[1]) == max(0, 2 * k - 32)  # the least overlap there can be
        kept = [j for j in range(32) if j not in masked[0] | masked[1]]
        assert [first[j] for j in kept] == [second[j] for j in kept]


def test_rates_follow_the_fitted_density(runs, density):
    table = json.loads(density.read_text())
    assert table["target"] == "gradient"
    ts = [t for (split, _), (t, _) in runs["1 rank"].masks().items() if split == Split.TRAIN]
    assert len(set(ts)) == 12
    assert all(0 < t <= 1 for t in ts)


ONLINE = [
    *"--mdm-rate-sampler ppots --mdm-ppots-refit-interval 2 --mdm-ppots-bins 4".split(),
    *"--mdm-mask exact-count --mdm-views 2 --lr 1e-3 --train-iters 7".split(),
]


@pytest.fixture(scope="module", params=["loss", "gradient"])
def online(request, base, tmp_path_factory):
    """P-POTS fitted while training: uninterrupted, and stopped between two fits under layouts."""
    target = ["--mdm-ppots-target", request.param]
    directory = tmp_path_factory.mktemp("online")
    data, load = base[: base.index("--load")], base[base.index("--load") :]
    whole = ranks.launch(directory / "whole", 1, *data, *ONLINE, *target, *load)
    checkpoint = str(directory / "checkpoint")
    parts = []
    for i, layout in enumerate(
        [
            "--tensor-model-parallel-size 2 --sequence-parallel --exit-interval 3",
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        ]
    ):
        source = ["--load", checkpoint] if i else load
        flags = [
            *ONLINE,
            *target,
            *layout.split(),
            "--save",
            checkpoint,
            "--save-interval",
            "3",
            *source,
        ]
        parts.append(ranks.launch(directory / f"part{i}", 2, *data, *flags))
    return whole, parts


def test_online_fits_are_made_and_alike_under_layouts_and_resumes(online):
    whole, parts = online
    tag = "mdm/density at t 0.05"
    assert len(whole.scalars[tag]) == 3  # iterations 2, 4, 6
    assert all(abs(q - 1) > 1e-3 for q in whole.scalars[tag])
    densities = [q for part in parts for q in part.scalars[tag]]
    # The fits see losses that are rounded differently: not bitwise, but far below any effect.
    assert densities == pytest.approx(whole.scalars[tag], rel=1e-3)


def test_online_training_goes_on_after_a_resume(online):
    whole, parts = online
    losses = [x for part in parts for x in part.losses]
    assert losses == pytest.approx(whole.losses, rel=1e-4)
    rates = {row: t for (_, row), (t, _) in whole.masks().items()}
    resumed = {row: t for part in parts for (_, row), (t, _) in part.masks().items()}
    assert resumed.keys() == rates.keys()
    assert list(resumed.values()) == pytest.approx([rates[row] for row in resumed], rel=1e-3)


def test_the_state_of_the_sampler_is_restored_bit_for_bit_in_another_layout(base, tmp_path):
    """A run that has nothing left to train loads the state and saves it again."""
    saved = tmp_path / "first"
    online_flags = [*ONLINE, "--train-iters", "3", "--save-interval", "2"]
    flags = [*base[: base.index("--load")], *online_flags]
    tp = ["--tensor-model-parallel-size", "2", "--save", str(saved)]
    pp = ["--pipeline-model-parallel-size", "2", "--save", str(tmp_path / "second")]
    pp += ["--num-layers-per-virtual-pipeline-stage", "1", "--load", str(saved)]
    ranks.launch(tmp_path / "tp", 2, *flags, *tp, *base[base.index("--load") :])
    ranks.launch(tmp_path / "pp", 2, *flags, *pp)
    before, after = ranks.weights(saved), ranks.weights(tmp_path / "second")
    assert any("mdm_sampler_state" in name for name in before)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.equal(after[name]), name


def test_a_repeated_iteration_neither_counts_nor_fits_again():
    """Megatron's rerun machine repeats an iteration: its moments would be decayed twice."""
    config = MDMConfig(mdm_rate_sampler="ppots", mdm_ppots_refit_interval=2, mdm_ppots_bins=4)
    sampler = OnlineSampler(config, 32)
    sampler.iteration = 2
    sampler.pending = ranks.torch.ones(17)
    assert sampler.step(2) is None  # a fit would need the process groups, which are not there
    assert sampler.pending is None
    assert sampler.measured is None


def test_measured_gradients_are_those_of_a_row(base, tmp_path):
    """Whatever the loss sum divides by, and however the batch is split, ||dl/dh|| is the row's.

    Rows that are not whole count by their tokens under `tokens` (tests/mcore/test_documents.py).
    """
    flags = [*base, "--train-iters", "1"]
    flags += "--mdm-rate-sampler ppots --mdm-ppots-refit-interval 1 --mdm-ppots-bins 4".split()
    flags += "--mdm-ppots-target gradient".split()
    splits = {"tokens": "--micro-batch-size 2", "rows": "--micro-batch-size 4"}
    tokens, rows = (
        ranks.launch(tmp_path / name, 1, *flags, "--mdm-normalization", name, *split.split())
        for name, split in splits.items()
    )
    names = [name for name in tokens.scalars if "density" in name]
    assert len(names) == 10
    for name in names:
        assert tokens.scalars[name] == pytest.approx(rows.scalars[name], rel=1e-4)


def test_isad_is_equal_under_layouts(base, tmp_path):
    flags = [*base, *ISAD, "--train-iters", "2"]
    one = ranks.launch(tmp_path / "one", 1, *flags)
    two = ranks.launch(tmp_path / "two", 2, *flags, "--tensor-model-parallel-size", "2")
    assert two.masks() == one.masks()
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.grad_norms == pytest.approx(one.grad_norms, rel=1e-5)


def test_another_density_is_named_at_resume(base, density, tmp_path):
    flags = ["--train-iters", "2", "--save-interval", "1", "--save", str(tmp_path / "checkpoint")]
    ppots = ["--mdm-rate-sampler", "ppots", "--mdm-ppots-file", str(density)]
    ranks.launch(tmp_path / "first", 1, *base, *ppots, *flags)
    data = base[: base.index("--load")]
    resumed = ranks.launch(
        tmp_path / "second", 1, *data, *flags, "--load", str(tmp_path / "checkpoint"), check=False
    )
    assert resumed.status != [0]
    assert "--mdm-rate-sampler uniform (checkpoint: ppots)" in resumed.output[0]
    assert "--mdm-ppots-digest" in resumed.output[0]
