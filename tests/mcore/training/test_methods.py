"""Views, densities of t and ISAD through the program: layouts, resume, and a fitted density."""

import json
import os
import runpy
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine
from megatron.training import initialize

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.flags.resume import plan_resume
from megatron_mdm.mcore.training import ppots
from megatron_mdm.objective.ppots.fit import fit
from megatron_mdm.objective.ppots.moments import RateMoments
from megatron_mdm.objective.randomness import Split
from megatron_mdm.objective.samplers import PiecewiseSampler
from megatron_mdm.pretrain import main
from tests import ROOT, ranks
from tests.mcore.training.nan_rows import nan_row
from tests.ranks import entries

ISAD = ["--mdm-isad-token-ids", "10", "11", "12", "--mdm-isad-weight", "exact"]


@pytest.fixture(scope="module")
def density(base, tmp_path_factory):
    """A density fitted to the base checkpoint by the tool, as a user starts it."""
    path = tmp_path_factory.mktemp("fit") / "ppots.json"
    flags = "--target gradient --rates 8 --rows 4 --masks 4 --family piecewise".split()
    where = ["--device", "cpu", "--load", base[base.index("--load") + 1], "--output", str(path)]
    printed = ranks.run_tool("fit_ppots", *where, *flags)
    assert "gradient over 128 draws" in printed
    assert "standard error of the second moment: " in printed and "% at most, for t in (" in printed
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
    return ranks.launch_layouts(
        tmp_path_factory.mktemp("methods"),
        {name: (n, [*base, *methods, *flags.split()]) for name, (n, flags) in layouts.items()},
    )


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
    ends = zip(whole.scalars[tag], whole.scalars["mdm/density at t 0.95"], strict=True)
    assert all(max(abs(low - 1), abs(high - 1)) > 1e-3 for low, high in ends)
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


def every_step_twice() -> None:
    """`ranks.train`, where the rerun machine works in a mode that --rerun-mode cannot choose."""
    initialize.RerunMode = lambda mode: RerunMode.REPORT_DETERMINISM_STATS
    ranks.train()


def measured_rows() -> None:
    """The program, saving t, value and importance weight of the rows that P-POTS measured.

    One tensor rank of the last stage saves those of its rows.
    """
    rows: list = []
    record = ppots.OnlineSampler.record

    def recording_record(self, t, value, rate_weight, present=None):
        rows.append(torch.stack([x.detach().double().flatten() for x in (t, value, rate_weight)]))
        record(self, t, value, rate_weight, present)

    ppots.OnlineSampler.record = recording_record
    main()
    if rows and mpu.get_tensor_model_parallel_rank() == 0:
        path = f"{os.environ['TRACE_DIR']}/measured{os.environ['RANK']}.pt"
        torch.save(torch.cat(rows, dim=1), path)


def other_density() -> None:
    """The program on a machine whose last rank computes differently."""
    fit = ppots.fit

    def other_fit(*args, **settings):
        settings["uniform_share"] += 0.01 * int(os.environ["RANK"])
        return fit(*args, **settings)

    ppots.fit = other_fit
    main()


def file_of_a_node() -> None:
    """The program on nodes of their own disks: RANK in a flag stands for the rank."""
    sys.argv = [word.replace("RANK", os.environ["RANK"]) for word in sys.argv]
    main()


@pytest.mark.parametrize("target", ["loss", "gradient"])
def test_five_refits_agree_between_layouts(target, base, tmp_path):
    """Each layout rounds otherwise, trains on, and is refitted to what it then measures.

    Worth its four starts for each target: no pure test knows what rounding of a real model is, and
    how far it grows over five refits. Other numbers of bins and of rows take no other starts: they
    are fitted to the rows that these measured.
    """
    flags = "--mdm-rate-sampler ppots --mdm-ppots-refit-interval 2 --mdm-ppots-bins 12".split()
    flags += "--global-batch-size 80 --micro-batch-size 4 --train-iters 10 --lr 1e-3".split()
    flags += ["--mdm-ppots-target", target]
    layouts = {
        "DP 1": (1, ""),
        "DP 2": (2, ""),
        "TP 2": (2, "--tensor-model-parallel-size 2"),
        "PP 2": (2, "--pipeline-model-parallel-size 2"),
    }
    t = torch.linspace(0.0, 1.0, 2001, dtype=torch.float64)
    logged, fitted = {}, {}
    for name, (count, layout) in layouts.items():
        directory = tmp_path / name
        run = ranks.launch(directory, count, *base, *flags, *layout.split(), entry=measured_rows)
        tags = sorted(tag for tag in run.scalars if "density at t" in tag)
        logged[name] = np.array([run.scalars[tag] for tag in tags])
        parts = [torch.load(path) for path in sorted(directory.glob("measured*.pt"))]
        # Iterations of 80 rows, over data-parallel ranks.
        steps = torch.cat([part.view(3, 10, -1) for part in parts], dim=2)
        few = steps[0, 0].argsort()[torch.arange(64) * 80 // 64]
        for rows, measured in ((64, steps[:, 0, few]), (800, steps.flatten(1))):
            for num_bins in (8, 12, 30):
                moments = RateMoments(num_bins)
                moments.update(*measured)
                fitted[name, rows, num_bins] = fit(moments, target=target).sampler().density(t)
    assert logged["DP 1"].shape == (10, 5)
    for name in layouts:
        np.testing.assert_allclose(logged[name], logged["DP 1"], rtol=1e-5)
        for _, *case in fitted:
            np.testing.assert_allclose(
                fitted[name, *case], fitted["DP 1", *case], rtol=1e-5, err_msg=f"{name} {case}"
            )


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


def test_a_stop_between_two_fits_changes_no_bit(base, tmp_path):
    """Fits at 2, 4 and 6, a stop after 3 in the same layout: the same rates, masks and losses."""
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
    """Megatron's rerun machine repeats every step here, those with a fit included.

    That a row is masked alike both times is asserted where `ranks.train` records it.
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
    """The machine restores, then saves: the iteration is repeated from there, and counts once."""
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


def test_other_density_files_on_other_nodes_are_refused(base, density, tmp_path):
    content = json.loads(density.read_text())
    for rank, values in enumerate((content["density"], content["density"][::-1])):
        (tmp_path / f"ppots{rank}.json").write_text(json.dumps({**content, "density": values}))
    flags = ["--mdm-rate-sampler", "ppots", "--mdm-ppots-file", str(tmp_path / "ppotsRANK.json")]
    run = ranks.launch(tmp_path, 2, *base, *flags, entry=file_of_a_node, check=False)
    assert 2 in run.status and 0 not in run.status
    message = (
        "error: rank {0}: --mdm-ppots-file {1}/ppots{0}.json is not the same file on all nodes"
    )
    assert any(message.format(i, tmp_path) in text for i, text in enumerate(run.output))


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
    # The log shows which rates it was at.
    line = next(x for x in run.output[0].splitlines() if "mdm iteration        1" in x)
    per_rate = line.rpartition("| ")[2]
    assert ("0.25: nan" in per_rate) != ("0.75: nan" in per_rate)


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


def test_measured_gradients_are_those_of_a_row(base, tmp_path):
    """Whatever the loss sum divides by, and however the batch is split, ||dl/dh|| is the row's.

    Rows that are not whole count by their tokens under `tokens`
    (tests/mcore/data/test_documents.py).
    """
    flags = [*base, "--train-iters", "1"]
    flags += "--mdm-rate-sampler ppots --mdm-ppots-refit-interval 1 --mdm-ppots-bins 4".split()
    flags += "--mdm-ppots-target gradient".split()
    splits = {"tokens": "--micro-batch-size 2", "rows": "--micro-batch-size 4"}
    tokens, rows = (
        ranks.launch(tmp_path / name, 1, *flags, "--mdm-normalization", name, *split.split())
        for name, split in splits.items()
    )
    names = [name for name in tokens.scalars if "density at t" in name]
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
    changed = f"--mdm-ppots-file None (checkpoint: the density that {density} held)"
    assert changed in resumed.output[0]
    longer = [*flags, "--train-iters", "3", "--load", str(tmp_path / "checkpoint")]
    resumed = ranks.launch(tmp_path / "third", 1, *data, *ppots, *longer, check=False)
    assert resumed.status == [2]
    assert "another total number of iterations: 16, here 24" in resumed.output[0]
    override = "--override-opt_param-scheduler"
    assert f"add {override} for this run's schedule" in resumed.output[0]
    assert len(ranks.launch(tmp_path / "last", 1, *data, *ppots, *longer, override).losses) == 1


def test_a_run_that_fits_its_density_resumes_without_the_file_it_began_with():
    """Another density is in the checkpoint by then, whatever is in the file, or without one."""
    fitted = {"rate_sampler": "ppots", "ppots_refit_interval": 2}
    for file in ("gone.json", None):
        config = MDMConfig(**fitted, ppots_file=file)
        args = Namespace(**config.arguments(), load="somewhere", finetune=False)
        args.mdm_row_order, args.ckpt_format = "epoch", "torch_dist"
        args.use_checkpoint_opt_param_scheduler, args.step_batch_size_schedule = False, None
        args.weight_decay_incr_style, args.skip_train = "constant", False
        saved = {
            **vars(args),
            "mdm_ppots_file": "gone.json",
            "mdm_ppots_digest": "0123456789abcdef",
        }
        before = dict(vars(args))
        plan = plan_resume(args, saved)
        assert plan.sampler_state_in_checkpoint and plan.ppots_file is None
        assert vars(args) == before
    with pytest.raises(UserError, match=r"file None \(checkpoint: the density that gone.json held"):
        plan_resume(args, {**saved, "mdm_ppots_refit_interval": 0})


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
    # What only a fine-tuning run has, and ISAD, whose masks are not measured, is left behind.
    of_pairs = MDMConfig(sft=True, syrm_fraction=0.5, isad_token_ids=[1])
    args = Namespace(**of_pairs.arguments())
    words = [*words[:4], "--no-mdm-sft", "--mdm-mask", "exact-count"]
    monkeypatch.setattr(sys, "argv", ["fit_ppots", *words])
    tool["take_over"](tool["parse"](), args)
    assert (args.mdm_sft, args.mdm_syrm_fraction, args.mdm_mask) == (False, 0.0, "exact-count")


# -- what a resume keeps of the methods


@pytest.fixture(scope="module")
def four_steps(base, tmp_path_factory):
    """Flags that resume a run of four steps of 8 rows, whose logs have a control variate."""
    directory = tmp_path_factory.mktemp("four")
    data, load = base[: base.index("--load")], base[base.index("--load") :]
    save = ["--save", str(directory / "checkpoint"), "--save-interval", "4", "--exit-interval", "4"]
    first = ranks.launch(directory / "run", 1, *data, *LONGER, *save, *load)
    return [*data, *LONGER, "--load", str(directory / "checkpoint")], first


LONGER = "--train-iters 8 --mdm-rate-bins 4 --mdm-quantiles iid".split()


def test_texts_go_on_where_they_were_with_another_number_of_views(four_steps, base, tmp_path):
    """1 -> 2 views: rows 32 and 33 are both of text 32; back again rows go on with the next."""
    flags, first = four_steps
    allow = ["--mdm-allow-flag-change"]
    second = str(tmp_path / "second")
    save = ["--save", second, "--save-interval", "6", "--exit-interval", "6"]
    two = ranks.launch(tmp_path / "two", 1, *flags, *save, *allow, "--mdm-views", "2")
    last = flags[: flags.index("--load")]
    one = ranks.launch(tmp_path / "one", 2, *last, "--load", second, *allow)
    assert [x for run in (first, two, one) for x in run.scalars["mdm/texts"]] == [
        *(8, 16, 24, 32),
        *(36, 40),
        *(48, 56),
    ]
    # Masked rows of a text keep its tokens: those of an uninterrupted run of one view say which.
    data = [*base[: base.index("--load")], *LONGER, *base[base.index("--load") :]]
    whole = ranks.launch(tmp_path / "whole", 1, *data)
    texts = {row: masked for (_, row), (_, masked) in whole.masks().items()}
    two_rows = {row: masked for (_, row), (_, masked) in two.masks().items()}
    one_rows = {row: masked for (_, row), (_, masked) in one.masks().items()}
    assert set(two_rows) == set(range(32, 48)) and set(one_rows) == set(range(48, 64))

    def agree(one, other):
        pairs = zip(one, other, strict=True)
        return all(a == b or ranks.MASK_ID in (a, b) for a, b in pairs)

    assert all(agree(two_rows[row], texts[32 + (row - 32) // 2]) for row in range(32, 48))
    assert all(agree(one_rows[row], texts[40 + row - 48]) for row in range(48, 64))


def test_views_that_would_begin_within_a_text_are_refused(four_steps, tmp_path):
    flags, _ = four_steps
    more = "--mdm-views 3 --mdm-allow-flag-change --micro-batch-size 3 --global-batch-size 3"
    run = ranks.launch(tmp_path, 1, *flags, *more.split(), check=False)
    assert "the 32 rows that the run has trained on are not a multiple of it" in run.output[0]


def test_the_controlled_loss_goes_on(four_steps, base, tmp_path):
    """Under another layout, where another rank logs; with other bins it says that it starts over"""
    flags, first = four_steps
    data, load = base[: base.index("--load")], base[base.index("--load") :]
    whole = ranks.launch(tmp_path / "whole", 1, *data, *LONGER, *load)
    parts = [first, ranks.launch(tmp_path / "pp", 2, *flags, "--pipeline-model-parallel-size", "2")]
    name = "mdm/controlled loss"
    controlled = [x for part in parts for x in part.scalars[name]]
    assert controlled == pytest.approx(whole.scalars[name], rel=1e-5)
    over = "the controlled loss in the logs starts over"
    assert over not in parts[1].output[0]
    other = ranks.launch(tmp_path / "other", 1, *flags, "--mdm-rate-bins", "5")
    assert over in other.output[0]
    assert other.scalars[name][0] == pytest.approx(other.scalars["mdm/loss"][0])
    assert abs(whole.scalars[name][4] - whole.scalars["mdm/loss"][4]) > 1e-4


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
    """The density is the one that the flags say, and fits see the rows from here on."""
    flags = [*base[: base.index("--load")], *ONLINE, *change.split(), "--mdm-allow-flag-change"]
    run = ranks.launch(tmp_path, 1, *flags, "--load", online_checkpoint)
    assert "P-POTS begins to measure anew, from the density that the flags say" in run.output[0]
    assert f"{change.split()[0]} {change.split()[1]} (checkpoint: " in run.output[0]
    # 8 rows of iteration 4, which count half if that was enough for a fit, and 16 since; with those
    # from before the stop there would be 28.
    line = next(x for x in run.output[0].splitlines() if "P-POTS refit at iteration 6" in x)
    assert " of 20 rows, " in line or " of 24 rows, " in line


@pytest.fixture(scope="module")
def online_checkpoint(base, tmp_path_factory):
    """Of a run that fits its density, between two fits."""
    directory = tmp_path_factory.mktemp("online")
    save = ["--save", str(directory / "checkpoint"), "--save-interval", "3"]
    ranks.launch(directory / "run", 1, *base, *ONLINE, *save, "--exit-interval", "3")
    return str(directory / "checkpoint")
