"""The numbers of a validation and their errors; rows that count once."""

from functools import partial

import numpy as np
import pytest
import torch

from megatron_mdm.mcore.training import metrics
from megatron_mdm.objective.corruption import Corrupter
from megatron_mdm.objective.loss import row_losses
from megatron_mdm.objective.randomness import GRID_BITS, Split
from megatron_mdm.objective.samplers import PiecewiseSampler, count_weight
from megatron_mdm.objective.segments import counts
from tests import ranks


def test_one_model_has_one_validation_number(base, tmp_path):
    """Earlier evaluations, layout and training flags have no influence; the learning rate is 0."""
    flags = [*base, "--lr", "0", "--eval-interval", "1", "--eval-iters", "2", "--train-iters", "3"]
    others = "--mdm-mask exact-count --mdm-quantiles iid --tensor-model-parallel-size 2".split()
    one = ranks.launch(tmp_path / "one", 1, *flags)
    two = ranks.launch(tmp_path / "two", 2, *flags, *others)
    numbers = [*one.scalars["mdm loss validation"], *two.scalars["mdm loss validation"]]
    assert len(numbers) == 8  # after each step and at the end
    assert numbers == pytest.approx([numbers[0]] * 8, rel=1e-6)
    assert len(set(one.scalars["mdm/validation NELBO"])) == 1


@pytest.fixture
def alone(monkeypatch):
    """This process is the only rank."""
    monkeypatch.setattr(metrics.mpu, "get_data_parallel_group", lambda **_: None)
    monkeypatch.setattr(metrics.torch.distributed, "all_reduce", lambda *_, **__: None)


@pytest.mark.parametrize("of_counts", [False, True])
def test_a_loss_of_1_is_1_in_every_bin(alone, of_counts):
    """Whatever importance weight the loss has: of the rate, or of the number of masked tokens."""
    sampler = PiecewiseSampler([0.0, 0.1, 1.0], np.array([5.0, 2.0, 0.2]) / 1.34)
    weight = partial(count_weight, sampler) if of_counts else None
    corrupter = Corrupter(sampler, "exact-count", 9, 1e-3, count_weight=weight)
    blocks = torch.arange(8).expand(64, 8) // 3  # the last block is short
    generator = torch.Generator().manual_seed(1)
    uniforms, quantile = torch.randint(2**GRID_BITS, (2, 64, 8), generator=generator)
    eligible = torch.ones_like(blocks, dtype=torch.bool)
    rows = corrupter(torch.zeros_like(blocks), eligible, uniforms, quantile, blocks)
    sizes, masked = counts(eligible, blocks), counts(rows.mask, blocks)
    ones = torch.ones(64, 8, dtype=torch.float64)
    loss = row_losses(ones, rows.mask, rows.weight, sizes, "tokens", blocks).per_row
    recorder = metrics.Recorder(5)
    weights = rows.rate_weight, rows.draw_weight, rows.largest_weight
    recorder.add(torch.zeros(64, dtype=torch.int64), rows.t, *weights, loss, masked, sizes)
    recorder.commit(1)
    assert recorder.reduce()[Split.TRAIN].loss_per_bin == pytest.approx([1.0] * 5, rel=1e-12)


def test_a_repeated_iteration_is_logged_once(alone):
    """Megatron's rerun machine repeats an iteration to validate a loss."""
    recorder = metrics.Recorder(2)
    row = [torch.zeros(1, dtype=torch.int64), torch.tensor([0.3]), torch.ones(1)]
    row += [torch.ones(1)] * 3 + [torch.ones(1, dtype=torch.int64)] * 2
    recorder.add(*row)
    recorder.commit(1)
    assert recorder.reduce()[Split.TRAIN].rows == 1
    recorder.add(*row)
    recorder.commit(1)
    assert recorder.total is None


def test_the_error_of_few_texts_is_that_of_texts():
    """256 rows of 2 texts tell about 2 texts only: the error is that of a mean of two clusters."""
    text = np.arange(256) % 2
    loss = np.where(text == 0, 3.0, 4.0)
    assert metrics.error_by_text(loss, text) == (pytest.approx(0.5), 2)
    alone = loss.std(ddof=1) / 16
    assert metrics.error_by_text(loss, np.arange(256)) == (pytest.approx(alone), 256)
    error, texts = metrics.error_by_text(loss, np.zeros(256))
    assert np.isnan(error) and texts == 1
    # Texts with unequal numbers of rows, here 1 and 3: the error is that of a ratio of sums.
    loss, text = np.array([1.0, 5.0, 5.0, 5.0]), np.array([0, 1, 1, 1])
    assert metrics.error_by_text(loss, text) == (pytest.approx(3 * 2**0.5 * 2**0.5 / 4), 2)


def test_a_small_validation_split_says_how_many_texts_it_has(base, tmp_path):
    """Under two data-parallel ranks. A longer evaluation begins with the rows of a shorter one."""
    documents = [[5 + i % 90] * 31 + [ranks.EOD_ID] for i in range(40)]
    ranks.write_documents(tmp_path / "text", documents)
    flags = [*base, "--data-path", str(tmp_path / "text"), "--split", "95,5,0", "--lr", "0"]
    words = {n: [*flags, "--eval-iters", n, "--train-iters", "1"] for n in ("1", "2")}
    runs = ranks.launch_all(tmp_path, 2, words)
    line = {}
    for iters in (1, 2):
        run = runs[str(iters)]
        line[iters] = next(x for x in run.output[1].splitlines() if "validation NELBO" in x)
        assert f"(mean over {8 * iters} rows, 2 of them different)" in line[iters]
        seen = {row: value for (split, row), value in run.masks().items() if split == Split.VALID}
        assert set(seen) == set(range(8 * iters))
        first = {row: seen[row] for row in range(8)}
        assert line.setdefault("rows", first) == first
    errors = [float(line[iters].split("+- ")[1].split()[0]) for iters in (1, 2)]
    assert all(error > 0 for error in errors)
