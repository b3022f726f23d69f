"""P-POTS fitted while training: under layouts, over stops, and with rows it cannot use."""

import os

import numpy as np
import pytest
import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine
from megatron.training import initialize
from torch.nn import functional

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.data.batch import Batch
from megatron_mdm.mcore.device import replaced
from megatron_mdm.mcore.training import ppots
from megatron_mdm.mcore.training.micro_batch import MicroBatch
from megatron_mdm.mcore.training.ppots import OnlineSampler
from megatron_mdm.objective.corruption import Corruption
from megatron_mdm.objective.ppots.fit import fit
from megatron_mdm.objective.ppots.moments import RateMoments
from megatron_mdm.objective.samplers import PiecewiseSampler
from megatron_mdm.objective.segments import totals
from megatron_mdm.pretrain import main
from tests import ranks
from tests.mcore.training.nan_rows import nan_row
from tests.one_rank import on_one_cpu_rank

ONLINE = [
    *"--mdm-rate-sampler ppots --mdm-ppots-refit-interval 2 --mdm-ppots-bins 4".split(),
    *"--mdm-mask exact-count --mdm-views 2 --lr 1e-3 --train-iters 7".split(),
]


@pytest.fixture(scope="module", params=["loss", "gradient"])
def online(request, base, tmp_path_factory):
    """An uninterrupted run with fits, and one that stops between two fits and changes layout."""
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
    ends = zip(whole.scalars[tag], whole.scalars["mdm/density at t 0.95"], strict=True)
    assert all(max(abs(low - 1), abs(high - 1)) > 1e-3 for low, high in ends)
    densities = [q for part in parts for q in part.scalars[tag]]
    # Fits see losses that are rounded differently, so they are not bitwise equal but very close.
    assert densities == pytest.approx(whole.scalars[tag], rel=1e-3)


def test_online_training_goes_on_after_a_resume(online):
    whole, parts = online
    losses = [x for part in parts for x in part.losses]
    assert losses == pytest.approx(whole.losses, rel=1e-4)
    rates = {row: t for (_, row), (t, _) in whole.masks().items()}
    resumed = {row: t for part in parts for (_, row), (t, _) in part.masks().items()}
    assert resumed.keys() == rates.keys()
    assert list(resumed.values()) == pytest.approx([rates[row] for row in resumed], rel=1e-3)


def every_step_twice() -> None:
    """Runs `ranks.train` with a rerun mode that --rerun-mode cannot choose: every step twice."""
    initialize.RerunMode = lambda mode: RerunMode.REPORT_DETERMINISM_STATS
    ranks.train()


def measured_rows() -> None:
    """Runs the program, and saves t, value and importance weight of the rows that P-POTS measured.

    One tensor-parallel rank of the last stage saves the values of its rows.
    """
    rows: list = []
    record = ppots.OnlineSampler.record

    def recording_record(self, t, value, rate_weight, present=None):
        rows.append(torch.stack([x.detach().double().flatten() for x in (t, value, rate_weight)]))
        record(self, t, value, rate_weight, present)

    with replaced(ppots.OnlineSampler, "record", recording_record):
        main()
    if rows and mpu.get_tensor_model_parallel_rank() == 0:
        path = f"{os.environ['TRACE_DIR']}/measured{os.environ['RANK']}.pt"
        torch.save(torch.cat(rows, dim=1), path)


def other_density() -> None:
    """Runs the program as if its last rank computed other fits."""
    fit = ppots.fit

    def other_fit(*args, **settings):
        settings["uniform_share"] += 0.01 * int(os.environ["RANK"])
        return fit(*args, **settings)

    ppots.fit = other_fit
    main()


REFITS = [
    *"--mdm-rate-sampler ppots --mdm-ppots-refit-interval 2 --mdm-ppots-bins 12".split(),
    *"--global-batch-size 80 --micro-batch-size 4 --train-iters 10 --lr 1e-3".split(),
]
LAYOUTS = {
    "DP 1": (1, ""),
    "DP 2": (2, ""),
    "TP 2": (2, "--tensor-model-parallel-size 2"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def refits(base, tmp_path_factory):
    """By target and layout: a run with five refits, and the numbers that it fitted.

    They are (t, value, weight) of 10 iterations of 80 rows, [3, 10, 80]. Each layout rounds
    differently, trains on, and refits to its own measurements. Both targets need real runs: no unit
    test knows the rounding of a real model, and how it grows over five refits.
    """
    directory = tmp_path_factory.mktemp("refits")
    runs = ranks.launch_layouts(
        directory,
        {
            f"{target} {name}": (
                count,
                [*base, *REFITS, "--mdm-ppots-target", target, *layout.split()],
            )
            for target in ("loss", "gradient")
            for name, (count, layout) in LAYOUTS.items()
        },
        entry=measured_rows,
    )

    def measured(name):
        parts = [torch.load(path) for path in sorted((directory / name).glob("measured*.pt"))]
        # Joins the data-parallel ranks: 80 rows per iteration.
        return torch.cat([part.view(3, 10, -1) for part in parts], dim=2)

    return {name: (run, measured(name)) for name, run in runs.items()}


@pytest.mark.parametrize("target", ["loss", "gradient"])
def test_five_refits_agree_between_layouts(target, refits):
    """The rows that these runs measured are also fitted with other numbers of bins and of rows."""
    t = torch.linspace(0.0, 1.0, 2001, dtype=torch.float64)
    logged, fitted = {}, {}
    for name in LAYOUTS:
        run, steps = refits[f"{target} {name}"]
        tags = sorted(tag for tag in run.scalars if "density at t" in tag)
        logged[name] = np.array([run.scalars[tag] for tag in tags])
        few = steps[0, 0].argsort()[torch.arange(64) * 80 // 64]
        for rows, measured in ((64, steps[:, 0, few]), (800, steps.flatten(1))):
            for num_bins in (8, 12, 30):
                moments = RateMoments(num_bins)
                moments.update(*measured)
                fitted[name, rows, num_bins] = fit(moments, target=target).sampler().density(t)
    assert logged["DP 1"].shape == (10, 5)
    for name in LAYOUTS:
        np.testing.assert_allclose(logged[name], logged["DP 1"], rtol=1e-5)
        for _, *case in fitted:
            np.testing.assert_allclose(
                fitted[name, *case], fitted["DP 1", *case], rtol=1e-5, err_msg=f"{name} {case}"
            )


def test_the_state_of_the_sampler_is_restored_bit_for_bit_in_another_layout(base, tmp_path):
    """A run that has no steps left loads the state and saves it again."""
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


def test_a_stop_between_two_fits_changes_no_bit(base, tmp_path):
    """With fits at 2, 4 and 6 and a stop after 3: equal rates, masks and losses."""
    data, load = base[: base.index("--load")], base[base.index("--load") :]
    flags = [*data, *ONLINE, "--mdm-ppots-target", "gradient"]
    checkpoint = str(tmp_path / "checkpoint")
    saves = ["--save", checkpoint, "--save-interval", "100"]
    whole = ranks.launch(tmp_path / "whole", 2, *flags, *load)
    parts = [
        ranks.launch(tmp_path / "first", 2, *flags, *load, *saves, "--exit-interval", "3"),
        ranks.launch(tmp_path / "second", 2, *flags, *saves, "--load", checkpoint),
    ]
    assert parts[0].masks() | parts[1].masks() == whole.masks()
    assert parts[0].losses + parts[1].losses == whole.losses
    density = "mdm/density at t 0.05"
    assert len(parts[1].scalars[density]) == 2
    assert [q for part in parts for q in part.scalars[density]] == whole.scalars[density]


def test_repeated_iterations_change_nothing(base, tmp_path):
    """Megatron's rerun machine repeats every step here, including steps with a fit.

    `ranks.train` asserts that a row gets the same mask both times.
    """
    flags = [*base, *ONLINE, "--train-iters", "5"]
    once = ranks.launch(tmp_path / "once", 1, *flags)
    twice = ranks.launch(tmp_path / "twice", 1, *flags, entry=every_step_twice)
    assert twice.masks() == once.masks()
    assert twice.losses == once.losses
    tag = "mdm/density at t 0.05"
    assert len(set(once.scalars[tag])) == 2  # iterations 2 and 4
    assert twice.scalars[tag] == [q for q in once.scalars[tag] for _ in range(2)]


def test_the_state_goes_back_before_a_checkpoint_of_a_suspicious_iteration(monkeypatch):
    """The machine restores and then saves: the iteration is repeated from there, counted once."""
    machine = RerunStateMachine(lambda: "theirs", lambda state: restored.append(state))
    restored = []
    monkeypatch.setattr(ppots, "get_rerun_state_machine", lambda: machine)
    config = MDMConfig(rate_sampler="ppots", ppots_refit_interval=2, ppots_bins=4)
    sampler = ppots.OnlineSampler(config, 32)
    sampler.follow_reruns()
    before = sampler.state.state_vector()
    saved = machine.state_save_func()
    for _ in range(2):
        sampler.state.moments.add(np.ones(17))
        sampler.state.pending = sampler.state.pending + 1
        sampler.state.sampler = PiecewiseSampler([0, 1], [0.5, 1.5])
        sampler.measured = sampler.pending = torch.ones(4, 17, dtype=torch.int64)
        machine.state_restore_func(saved)
        assert np.array_equal(sampler.state.state_vector(), before)
        assert sampler.measured is None and sampler.pending is None
    assert restored == ["theirs", "theirs"]


def test_ranks_with_other_densities_stop(base, tmp_path):
    run = ranks.launch(tmp_path, 2, *base, *ONLINE, entry=other_density, check=False)
    assert 0 not in run.status
    assert any(
        "fitted another density of the masking rate than others at iteration 2" in text
        for text in run.output
    )


def test_a_run_says_why_it_keeps_its_density(base, tmp_path):
    flags = "--mdm-rate-sampler ppots --mdm-ppots-refit-interval 1 --mdm-ppots-bins 500".split()
    run = ranks.launch(tmp_path, 1, *base, *flags, "--train-iters", "1")
    line = next(x for x in run.output[0].splitlines() if "P-POTS keeps its density" in x)
    assert "at iteration 1 | 0 rows skipped | 492 of 500 rate bins hold no rows" in line
    assert "--mdm-ppots-bins" in line


@pytest.mark.parametrize("target", ["loss", "gradient"])
def test_a_row_without_a_finite_loss_is_counted_and_stays_out_of_the_fit(base, tmp_path, target):
    flags = "--mdm-rate-sampler ppots --mdm-ppots-refit-interval 1 --mdm-ppots-bins 2".split()
    flags += ["--mdm-ppots-target", target]
    flags += "--train-iters 1 --mdm-rate-bins 2 --no-check-for-nan-in-loss-and-grad".split()
    run = ranks.launch(tmp_path, 1, *base, *flags, entry=nan_row)
    line = next(x for x in run.output[0].splitlines() if "P-POTS refit at iteration 1" in x)
    assert "of 7 rows, 1 skipped" in line
    assert all(np.isfinite(run.scalars[name]).all() for name in run.scalars if "density" in name)
    # The log shows the bin of the rate at which it happened.
    line = next(x for x in run.output[0].splitlines() if "mdm iteration        1" in x)
    per_rate = line.rpartition("| ")[2]
    assert ("0.25: nan" in per_rate) != ("0.75: nan" in per_rate)


def test_measured_gradients_are_those_of_a_row(base, tmp_path):
    """||dl/dh|| belongs to the row alone, for every normalization and split of the batch.

    Rows that are not whole count by their tokens under `tokens`
    (tests/mcore/data/test_documents.py).
    """
    flags = [*base, "--train-iters", "1"]
    flags += "--mdm-rate-sampler ppots --mdm-ppots-refit-interval 1 --mdm-ppots-bins 4".split()
    flags += "--mdm-ppots-target gradient".split()
    splits = {"tokens": "--micro-batch-size 2", "rows": "--micro-batch-size 4"}
    words = {
        name: [*flags, "--mdm-normalization", name, *split.split()]
        for name, split in splits.items()
    }
    tokens, rows = ranks.launch_all(tmp_path, 1, words).values()
    names = [name for name in tokens.scalars if "density at t" in name]
    assert len(names) == 10
    for name in names:
        assert tokens.scalars[name] == pytest.approx(rows.scalars[name], rel=1e-4)


@pytest.mark.parametrize("first", ["clean", "noisy"])
@pytest.mark.parametrize("views", [1, 3])
def test_the_gradient_of_a_view_is_its_own(views, first, monkeypatch):
    """The views of a text share the clean state that predicts the first token of a block."""
    mdm = MDMConfig(
        **{"shift": True, "shift_first": first, "views": views, "block_size": 3},
        **{"rate_sampler": "ppots", "ppots_refit_interval": 1, "ppots_target": "gradient"},
    )
    generator = torch.Generator().manual_seed(1)
    shape = 2 * views, 8
    tokens = torch.randint(9, (2, 8), generator=generator).repeat_interleave(views, dim=0)
    ends, mask = torch.full(shape[:1], 8), torch.rand(shape, generator=generator) < 0.5
    batch = Batch(mdm, 99, True, tokens, ends, ends, *[ends] * 2, *[tokens] * 2, block_size=3)
    mask &= batch.eligible
    weight, t = 0.5 + torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    corruption = Corruption(tokens, mask, weight, t, t, t)
    rows = batch.block_rows
    head = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    states = torch.randn(2, 8 * rows.copies, 5, generator=generator, dtype=torch.float64)
    states.requires_grad_()

    def squares(weights):
        """Squared gradients at the states that predict tokens, [b, s]."""
        labels = rows.labels(tokens[::views])
        losses = functional.cross_entropy((states @ head).mT, labels, reduction="none")
        of_tokens = rows.to_tokens(losses)[0]
        (gradient,) = torch.autograd.grad((of_tokens * weights).sum(), states)
        return rows.to_tokens(gradient.square().sum(dim=2))[0]

    recorded = []
    monkeypatch.setattr(OnlineSampler, "record", lambda *words: recorded.append(words[2]))
    with on_one_cpu_rank():
        sampler = OnlineSampler(mdm, seq_length=8)
        sampler.record_gradients(MicroBatch(batch, corruption), squares(weight * mask))
    for i in range(len(tokens)):
        alone = torch.zeros_like(weight)
        alone[i] = (weight * mask)[i]
        norms = totals(squares(alone), batch.rate_segments).sqrt()
        torch.testing.assert_close(recorded[0][i], norms[i] / t[i] / 8, rtol=1e-10, atol=0)


@pytest.fixture(scope="module")
def online_checkpoint(base, tmp_path_factory):
    """The checkpoint of a run that fits its density, saved between two fits."""
    directory = tmp_path_factory.mktemp("online")
    save = ["--save", str(directory / "checkpoint"), "--save-interval", "3"]
    ranks.launch(directory / "run", 1, *base, *ONLINE, *save, "--exit-interval", "3")
    return str(directory / "checkpoint")


@pytest.mark.parametrize(
    "change",
    [
        "--mdm-ppots-target gradient",
        "--mdm-normalization rows",
        "--mdm-mask bernoulli",
        "--mdm-ppots-bins 5",
    ],
)
def test_measurements_of_something_else_begin_anew(change, online_checkpoint, base, tmp_path):
    """The density is then the one that the flags give, and fits use only rows from here on."""
    flags = [*base[: base.index("--load")], *ONLINE, *change.split(), "--mdm-allow-flag-change"]
    run = ranks.launch(tmp_path, 1, *flags, "--load", online_checkpoint)
    assert "P-POTS begins to measure anew, from the density that the flags say" in run.output[0]
    assert f"{change.split()[0]} {change.split()[1]} (checkpoint: " in run.output[0]
    # 8 rows of iteration 4, which count half if they were enough for a fit, and 16 rows after it.
    # With the rows from before the stop there would be 28.
    line = next(x for x in run.output[0].splitlines() if "P-POTS refit at iteration 6" in x)
    assert " of 20 rows, " in line or " of 24 rows, " in line
