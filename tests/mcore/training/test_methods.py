"""Views, a fitted density of t and ISAD in the program: under layouts and after a resume."""

import json
import os
import sys

import numpy as np
import pytest

from megatron_mdm.objective.randomness import Split
from megatron_mdm.pretrain import main
from tests import ranks

ISAD = ["--mdm-isad-token-ids", "10", "11", "12", "--mdm-isad-weight", "exact"]


@pytest.fixture(scope="module")
def density(base, tmp_path_factory):
    """The file of a density fitted to the base checkpoint."""
    path = tmp_path_factory.mktemp("fit") / "ppots.json"
    flags = "--target gradient --rates 8 --rows 4 --masks 4 --family piecewise".split()
    ranks.fit_ppots(base[base.index("--load") + 1], path, *flags)
    return path


@pytest.fixture(scope="module")
def runs(base, density, tmp_path_factory):
    """Runs with all methods at once, under four layouts."""
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
        assert len(masked[0] & masked[1]) == max(0, 2 * k - 32)  # the least possible overlap
        kept = [j for j in range(32) if j not in masked[0] | masked[1]]
        assert [first[j] for j in kept] == [second[j] for j in kept]


def test_rates_follow_the_fitted_density(runs, density):
    table = json.loads(density.read_text())
    assert table["target"] == "gradient"
    ts = [t for (split, _), (t, _) in runs["1 rank"].masks().items() if split == Split.TRAIN]
    assert len(set(ts)) == 12
    assert all(0 < t <= 1 for t in ts)


def file_of_a_node() -> None:
    """Runs the program on nodes with disks of their own: RANK in a flag stands for the rank."""
    sys.argv = [word.replace("RANK", os.environ["RANK"]) for word in sys.argv]
    main()


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


# -- what a resume keeps of the methods

LONGER = "--train-iters 8 --mdm-rate-bins 4 --mdm-quantiles iid".split()


@pytest.fixture(scope="module")
def four_steps(base, tmp_path_factory):
    """Flags that resume a run of four steps of 8 rows, whose logs have a control variate."""
    directory = tmp_path_factory.mktemp("four")
    data, load = base[: base.index("--load")], base[base.index("--load") :]
    save = ["--save", str(directory / "checkpoint"), "--save-interval", "4", "--exit-interval", "4"]
    first = ranks.launch(directory / "run", 1, *data, *LONGER, *save, *load)
    return [*data, *LONGER, "--load", str(directory / "checkpoint")], first


def test_texts_go_on_where_they_were_with_another_number_of_views(four_steps, base, tmp_path):
    """From 1 to 2 views, rows 32 and 33 are of text 32. Back at 1, rows go on with the next."""
    flags, first = four_steps
    allow = ["--mdm-allow-flag-change"]
    second = str(tmp_path / "second")
    save = ["--save", second, "--save-interval", "6", "--exit-interval", "6"]
    two = ranks.launch(tmp_path / "two", 1, *flags, *save, *allow, "--mdm-views", "2")
    last = flags[: flags.index("--load")]
    one = ranks.launch(tmp_path / "one", 2, *last, "--load", second, *allow)
    assert [x for run in (first, two, one) for x in run.scalars["mdm/data rows"]] == [
        *(8, 16, 24, 32),
        *(36, 40),
        *(48, 56),
    ]
    # Masked rows keep a text's other tokens, so an uninterrupted run with one view identifies
    # texts.
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
    assert (
        "the 32 rows that the run has trained on are not a multiple of --mdm-views" in run.output[0]
    )


def test_the_controlled_loss_goes_on(four_steps, base, tmp_path):
    """It goes on under another layout, where another rank logs. With other bins it starts over."""
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
