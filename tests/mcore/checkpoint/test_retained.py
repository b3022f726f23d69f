"""--save-retain-interval: which checkpoints Megatron keeps, and that a run resumes from them."""

import pytest

from megatron_mdm.mcore.checkpoint.files import find_checkpoint
from tests import ranks

# Flags of examples/pretrain.
FLAGS = [
    *"--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable".split(),
    *"--ckpt-fully-parallel-load --save-interval 1 --save-retain-interval 3".split(),
    *"--train-iters 8 --lr-decay-style cosine".split(),
]


def iterations(path):
    """Iterations of the checkpoints in `path`, complete or not."""
    return sorted(int(directory.name.removeprefix("iter_")) for directory in path.glob("iter_*"))


@pytest.mark.parametrize("how", [[], ["--async-save"]], ids=["at once", "asynchronous"])
def test_checkpoints_stay_at_an_interval_and_the_last_one(how, data, tmp_path):
    """The run stops at 5 and resumes. The latest is deleted once the next one is complete."""
    path = tmp_path / "checkpoint"
    flags = ["--data-path", str(data), "--data-cache-path", str(tmp_path / "cache"), *FLAGS, *how]
    kept = ["--save", str(path), "--load", str(path)]
    whole = ranks.launch(tmp_path / "whole", 2, *flags, "--save", str(tmp_path / "other"))
    assert iterations(tmp_path / "other") == [3, 6, 8]

    first = ranks.launch(tmp_path / "first", 2, *flags, *kept, "--exit-interval", "5")
    assert iterations(path) == [3, 5] and find_checkpoint(str(path)).iteration == 5
    second = ranks.launch(tmp_path / "second", 2, *flags, *kept)
    assert iterations(path) == [3, 6, 8] and find_checkpoint(str(path)).iteration == 8
    assert first.losses + second.losses == whole.losses

    # Resumes from a retained checkpoint on fewer ranks.
    again = ranks.launch(tmp_path / "again", 1, *flags, "--load", str(path), "--ckpt-step", "6")
    assert again.losses == pytest.approx(whole.losses[6:], rel=1e-5)
