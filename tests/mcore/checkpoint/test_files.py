"""Finds the checkpoint in a directory, and names what a crash or a copy has damaged."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, mpu

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint.files import TRACKER, find_checkpoint
from megatron_mdm.mcore.checkpoint.integrity import INTEGRITY_FNAME, check_sums, write_sums
from megatron_mdm.mcore.checkpoint.saving import safe_checkpoints
from megatron_mdm.mcore.device import training_device
from tests import ranks
from tests.old_checkpoints.unpack import unpack


@pytest.fixture
def run(tmp_path):
    """A run's directory with complete checkpoints of iterations 3 and 6."""
    directory = unpack("pretraining", tmp_path)
    shutil.copytree(directory / "iter_0000006", directory / "iter_0000003")
    return directory


def latest(run):
    return run / "iter_0000006"


def cut(path, by=100):
    os.truncate(path, path.stat().st_size - by)


DAMAGES = {
    "an empty tracker": (lambda run: (run / TRACKER).write_text(""), "it holds '' instead", 6),
    "another tracker": (lambda run: (run / TRACKER).write_text("six"), "it holds 'six' instead", 6),
    "no tracker": (lambda run: (run / TRACKER).unlink(), f"has no {TRACKER}", 6),
    "no directory": (lambda run: shutil.rmtree(latest(run)), "iter_0000006 does not exist", 3),
    "no metadata": (lambda run: (latest(run) / ".metadata").unlink(), "lacks its .metadata", 3),
    "metadata cut": (lambda run: cut(latest(run) / ".metadata"), "has a damaged .metadata", 3),
    "metadata empty": (lambda run: os.truncate(latest(run) / ".metadata", 0), "damaged .meta", 3),
    "no config": (lambda run: (latest(run) / "metadata.json").unlink(), "lacks its metadata.j", 3),
    "config cut": (lambda run: cut(latest(run) / "metadata.json", 9), "damaged metadata.json", 3),
    "no shard": (lambda run: (latest(run) / "__0_0.distcp").unlink(), "lacks its __0_0.distcp", 3),
    "shard cut": (lambda run: cut(latest(run) / "__0_0.distcp"), "__0_0.distcp that is cut sh", 3),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named_with_a_remedy_that_works(case, run):
    damage, message, newest = DAMAGES[case]
    assert find_checkpoint(str(run)).iteration == 6
    damage(run)
    with pytest.raises(UserError) as caught:
        find_checkpoint(str(run))
    text = str(caught.value)
    assert message in text and "\n" not in text
    which = "" if newest == 6 else " before it"
    assert f"the newest complete checkpoint{which} is iteration {newest}; to take it: ech" in text
    os.system(text.rpartition("to take it: ")[2])
    assert find_checkpoint(str(run)).path == run / f"iter_{newest:07d}"


def test_a_branch_that_the_run_has_left_is_no_remedy(run):
    """After --ckpt-step 3 the tracker is behind later checkpoints of an abandoned branch."""
    shutil.copytree(latest(run), run / "iter_0000004")
    (run / TRACKER).write_text("4")
    cut(run / "iter_0000004" / "__0_0.distcp")
    with pytest.raises(UserError, match="complete checkpoint before it is iteration 3; to take it"):
        find_checkpoint(str(run))
    with pytest.raises(UserError, match="take the newest complete one before it, --ckpt-step 3$"):
        find_checkpoint(str(run), 4)
    shutil.rmtree(run / "iter_0000003")
    with pytest.raises(UserError, match="complete checkpoint is iteration 6; to take it: echo 6"):
        find_checkpoint(str(run))


def test_nothing_whole_is_left(run):
    shutil.rmtree(run / "iter_0000003")
    cut(latest(run) / "__0_0.distcp")
    with pytest.raises(UserError, match="cut short, .*: no complete checkpoint is left there"):
        find_checkpoint(str(run))


def test_a_first_save_that_was_killed_is_no_checkpoint(run, tmp_path):
    shutil.rmtree(run / "iter_0000003")
    (run / TRACKER).unlink()
    (latest(run) / "metadata.json").unlink()
    assert find_checkpoint(str(run)) is None
    assert find_checkpoint(str(tmp_path / "nothing")) is None


def test_an_iteration_that_is_asked_for(run):
    assert find_checkpoint(str(run), 3).path == run / "iter_0000003"
    with pytest.raises(UserError, match="no checkpoint of iteration 4: it has iteration 3, iterat"):
        find_checkpoint(str(run), 4)
    with pytest.raises(UserError, match=f"is one checkpoint .* above it, {run} with --ckpt-step 3"):
        find_checkpoint(str(run / "iter_0000003"))
    with pytest.raises(UserError, match=f"above it, {run} with --iteration 3$"):
        find_checkpoint(str(run / "iter_0000003"), step_flag="--iteration")
    with pytest.raises(UserError, match=f"above it, {run}$"):  # a program without such a flag
        find_checkpoint(str(run / "iter_0000003"), step_flag=None)
    (run / TRACKER).write_text("release")  # Megatron then ignores --ckpt-step
    with pytest.raises(UserError, match="says release, which Megatron loads whatever --ckpt-step"):
        find_checkpoint(str(run), 3)


def test_formats_without_metadata_json(run):
    (latest(run) / "metadata.json").unlink()
    assert find_checkpoint(str(run), ckpt_format="torch_dcp").iteration == 6
    cut(latest(run) / "__0_0.distcp")
    with pytest.raises(UserError, match="has a __0_0.distcp that is cut short"):
        find_checkpoint(str(run), ckpt_format="torch_dcp")


def test_one_rank_of_a_node_looks_at_every_file(run, monkeypatch):
    cut(latest(run) / "__0_0.distcp")
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_checkpoint(str(run)).iteration == 6
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="cut short"):
        find_checkpoint(str(run))


# -- sums


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x40]))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json"])
def test_a_flipped_bit_is_named(name, run):
    path = latest(run)
    write_sums(path)
    check_sums(path)
    size = (path / name).stat().st_size
    for place in (0, size // 2, size - 1):
        flip(path / name, place)
        with pytest.raises(UserError, match=f"{path} is damaged: {name} is not as it was saved"):
            check_sums(path)
        flip(path / name, place)
    check_sums(path)
    (path / name).unlink()
    with pytest.raises(UserError, match=f"cannot be read whole .{name}: No such file"):
        check_sums(path)


def test_megatron_reads_our_sums(run):
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    write_sums(latest(run))
    verify_integrity_manifest(str(latest(run)))


def test_sums_that_are_missing_or_damaged(run, capfd):
    check_sums(latest(run))
    assert f"has no {INTEGRITY_FNAME}: nothing tells" in capfd.readouterr().out
    for text in ("", "{}", json.dumps({"algorithm": "md5", "files": {}}), "[1]"):
        (latest(run) / INTEGRITY_FNAME).write_text(text)
        with pytest.raises(UserError, match=f"{INTEGRITY_FNAME} is damaged: copy"):
            check_sums(latest(run))


def test_every_shard_has_a_sum(run):
    """A shared disk may show the first rank only some files, but every shard needs a sum."""
    path = latest(run)
    write_sums(path)
    content = json.loads((path / INTEGRITY_FNAME).read_text())
    del content["files"]["__0_0.distcp"]
    (path / INTEGRITY_FNAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{INTEGRITY_FNAME} has no sum of __0_0.distcp: copy the"):
        check_sums(path)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match="cannot be read whole .__0_0.distcp: No such file"):
        write_sums(path)


def test_sums_of_what_was_saved_over_go(run, monkeypatch):
    write_sums(latest(run))

    def save(state, path):
        assert (latest(run) / INTEGRITY_FNAME).exists()  # after a kill, the sums reveal mixed files

    monkeypatch.setattr(dist_checkpointing, "save", save)
    with safe_checkpoints(hashes=False):
        dist_checkpointing.save({}, str(latest(run)))
    assert not (latest(run) / INTEGRITY_FNAME).exists()


def asynchronous_save() -> None:
    """Saves the names of a checkpoint's files at the time when Megatron would move the tracker."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_mdm.mcore.checkpoint.saving import safe_checkpoints

    directory, seen = Path(os.environ["TRACE_DIR"]), []
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(exist_ok=True)  # another rank may have made it
    with training_device("cpu"), safe_checkpoints(hashes=True):
        torch.distributed.init_process_group("gloo")
        mpu.initialize_model_parallel()
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        part = ShardedTensor.from_rank_offsets("part", torch.arange(4.0), (0, rank, size))
        request = dist_checkpointing.save(
            {"part": part}, str(checkpoint), async_sharded_save=True, async_strategy="mcore"
        )
        request.add_finalize_fn(lambda: seen.extend(os.listdir(checkpoint)))
        assert "integrity.json" not in os.listdir(checkpoint)
        request.execute_sync()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    (directory / f"seen{rank}.json").write_text(json.dumps(sorted(seen)))


def test_sums_are_there_before_the_tracker_moves(tmp_path):
    """This holds for asynchronous saves too, whose last steps run on all ranks."""
    ranks.launch(tmp_path, 2, entry=asynchronous_save)
    files = [".metadata", "__0_0.distcp", "__1_0.distcp", "integrity.json", "metadata.json"]
    for rank in range(2):
        assert json.loads((tmp_path / f"seen{rank}.json").read_text()) == files
    sums = json.loads((tmp_path / "checkpoint/integrity.json").read_text())["files"]
    assert sorted(sums) == [name for name in files if name != "integrity.json"]
    check_sums(tmp_path / "checkpoint")
