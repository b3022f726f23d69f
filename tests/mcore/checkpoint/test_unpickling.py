"""No tool runs the pickles of a hostile checkpoint; those of Megatron's checkpoints pass."""

import io
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint.unpickling import check_pickles
from tests import ROOT, ranks
from tests.ranks import entries

OLD = ROOT / "tests/old_checkpoints"


class Hostile:
    """An object that writes the file `ran` when it is unpickled."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return open, (str(self.ran), "w")


@pytest.fixture
def saved(base, tmp_path):
    """A copy of a checkpoint's directory, and the file that a hostile pickle would write."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(base[base.index("--load") + 1], copy)
    (directory,) = copy.glob("iter_*")
    (directory / "integrity.json").unlink()  # a hostile checkpoint has matching sums
    return directory, tmp_path / "ran"


def hostile_metadata(directory, ran):
    metadata = dcp.FileSystemReader(directory).read_metadata()
    metadata.planner_data = Hostile(ran)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def hostile_object(directory, ran, key="common_state/shard_0_1"):
    """Puts a hostile pickle in the place of the run's arguments or of another non-tensor."""
    metadata = dcp.FileSystemReader(directory).read_metadata()
    stream = io.BytesIO()
    torch.save([Hostile(ran)], stream)
    (directory / "__9_0.distcp").write_bytes(stream.getvalue())
    (index,) = (index for index in metadata.storage_data if index.fqn == key)
    info = metadata.storage_data[index]
    info.relative_path, info.offset, info.length = "__9_0.distcp", 0, len(stream.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def hostile_metadata_of_a_rank(directory, ran):
    """Puts it into a rank's metadata, which PyTorch reads if the common file is unreadable."""
    hostile_metadata(directory, ran)
    (directory / ".metadata").rename(directory / "__0.metadata")


def hostile_common(directory, ran):
    torch.save({"args": Hostile(ran)}, directory / "common.pt")


def hostile_rank(directory, ran):
    (directory / "mp_rank_00").mkdir()
    torch.save({"args": Hostile(ran)}, directory / "mp_rank_00" / "model_optim_rng.pt")


WAYS = {
    hostile_metadata: ".metadata",
    hostile_object: "__9_0.distcp",
    hostile_metadata_of_a_rank: "__0.metadata",
    hostile_common: "common.pt",
    hostile_rank: "model_optim_rng.pt",
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_could_run_is_named(way, saved):
    directory, ran = saved
    check_pickles(directory)
    way(directory, ran)
    with pytest.raises(UserError) as caught:
        check_pickles(directory)
    assert f"{WAYS[way]} holds " in str(caught.value) and "open, which no check" in str(
        caught.value
    )
    assert "\n" not in str(caught.value) and not ran.exists()


def test_without_the_check_they_run(saved):
    """PyTorch and Megatron stop none of these pickles."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    directory, ran = saved
    hostile_object(directory, ran)
    with pytest.raises(TypeError):  # the opened file is not the arguments
        load_common_state_dict(str(directory))["args"]
    assert ran.exists()
    ran.unlink()
    hostile_metadata(directory, ran)
    dcp.FileSystemReader(directory).read_metadata()
    assert ran.exists()


@pytest.mark.parametrize("way", [hostile_metadata, hostile_object], ids=lambda way: way.__name__)
def test_no_program_runs_them(way, saved, base, data, tmp_path):
    directory, ran = saved
    way(directory, ran)
    load = str(directory.parent)
    tool = ["--device", "cpu", "--load", load]
    output = str(tmp_path / "output")
    convert = ["--to", "huggingface", "--input", load, "--output", output]
    measured = ["--load", base[base.index("--load") + 1], "--data", str(data), "--rows", "2"]
    measured += ["--autoregressive", load, "--output", str(tmp_path / "x.json")]
    commands = {
        "evaluate": ["tools/evaluate.py", *tool, "--data", str(data)],
        "generate": ["tools/generate.py", *tool],
        "convert": ["tools/convert_checkpoint.py", *convert],
        "pretrain": [*base[: base.index("--load")], "--load", load],
        "other weights": ["tools/variance_report.py", "--device", "cpu", *measured],
    }
    for name, command in commands.items():
        entry = ranks.train if name == "pretrain" else entries.tool
        start = [] if name == "pretrain" else ["--"]
        run = ranks.launch(tmp_path / name, 1, *start, *command, entry=entry, check=False)
        assert run.status == [2], (name, run.output[0][-2000:])
        (line,) = [x for x in run.output[0].splitlines() if x.startswith("error: ")]
        assert f"{WAYS[way]} holds " in line and "Traceback" not in run.output[0], name
        assert not ran.exists(), name
    assert not Path(output).exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1])[:-1], pickle.dumps({})])
def test_other_contents_are_one_line(content, saved):
    directory, _ = saved
    (directory / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=".metadata (is damaged|holds dict, which)"):
        check_pickles(directory)
    (directory / ".metadata").unlink()
    check_pickles(directory)  # another check reports missing files
    check_pickles(directory / "nowhere")


def test_what_is_hidden_behind_a_transformation_is_not_let_through(saved):
    directory, ran = saved
    hostile_object(directory, ran)
    metadata = dcp.FileSystemReader(directory).read_metadata()
    for index, info in metadata.storage_data.items():
        if index.fqn == "common_state/shard_0_1":
            info.transform_descriptors = ["stream.zstd"]
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="__9_0.distcp holds an object behind"):
        check_pickles(directory)


FLAGS = {
    "distributed optimizer": (2, "--use-distributed-optimizer"),
    "reshardable": (
        2,
        "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
        "--ckpt-fully-parallel-save --ckpt-assume-constant-structure --bf16",
    ),
    "virtual stages": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "experts": (2, "--num-experts 4 --expert-model-parallel-size 2"),
    "ppots": (1, "--mdm-rate-sampler ppots --mdm-ppots-refit-interval 2"),
    "torch": (1, "--ckpt-format torch"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_checkpoints_of_runs_pass(name, base, tmp_path):
    world, flags = FLAGS[name]
    save = ["--train-iters", "4", "--save-interval", "2", "--save", str(tmp_path / "checkpoint")]
    ranks.launch(tmp_path, world, *base[: base.index("--load")], *flags.split(), *save)
    for directory in (tmp_path / "checkpoint").glob("iter_*"):
        check_pickles(directory)


@pytest.mark.parametrize("path", sorted(OLD.glob("*.tar.gz")), ids=lambda path: path.name)
def test_checkpoints_of_earlier_versions_pass(path, tmp_path):
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    directories = [path.parent for path in tmp_path.rglob(".metadata")]
    assert directories
    for directory in directories:
        check_pickles(directory)
