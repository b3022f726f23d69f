"""Which checkpoint a command starts from, and that no run saves over another run."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.training.arguments import parse_args

from megatron_mdm.config import requested_save
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint.files import TRACKER, find_checkpoint
from megatron_mdm.mcore.checkpoint.run_lock import LOCK, only_writer
from megatron_mdm.mcore.flags import arguments as arguments_module
from megatron_mdm.mcore.flags.arguments import add_arguments
from megatron_mdm.mcore.flags.start import choose_start
from megatron_mdm.pretrain import main
from tests import ranks
from tests.old_checkpoints.unpack import unpack


@pytest.fixture
def run(tmp_path):
    """A run's directory with checkpoints of iterations 3 and 6, saved by --load and --save RUN."""
    directory = unpack("pretraining", tmp_path)
    shutil.copytree(directory / "iter_0000006", directory / "iter_0000003")
    return str(directory)


@pytest.fixture
def start(monkeypatch):
    """A function from flags to (directory that the command starts from, its arguments)."""

    def choose(*flags):
        monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, flags)])
        args = parse_args(add_arguments)
        begun = choose_start(args)
        vars(args).update(begun.arguments)
        return begun.source, args

    return choose


def another(run, tmp_path, name="other"):
    return shutil.copytree(run, tmp_path / name)


def release(run):
    """Makes the directory one of a converted checkpoint."""
    for name in ("iter_0000003", "iter_0000006"):
        shutil.move(f"{run}/{name}", f"{run}/release")
        shutil.rmtree(f"{run}/iter_0000006", ignore_errors=True)
        break
    with open(f"{run}/{TRACKER}", "w") as file:
        file.write("release")


def saved_by(args: Namespace, directory) -> None:
    """Records these arguments in the checkpoints of a directory, as if their run had saved them."""
    for path in directory.glob("iter_*"):
        state = load_common_state_dict(str(path))
        state["args"] = args
        # Megatron reads this file, which its earlier versions wrote, before anything else.
        torch.save(state, path / "common.pt")


# -- what is loaded


def test_nothing_to_load(start, tmp_path):
    assert start()[0] is None
    assert start("--save", tmp_path / "new")[0] is None
    # The first start of a command that can be repeated.
    new = ["--load", tmp_path / "new", "--save", tmp_path / "new"]
    assert start(*new)[0] is None
    assert start("--pretrained-checkpoint", unpack("mirror", tmp_path), *new)[0] == str(
        tmp_path / "checkpoint"
    )


@pytest.mark.parametrize("more", [[], ["--save", "elsewhere"], ["--finetune"]])
def test_load_that_names_nothing(more, start, tmp_path):
    with pytest.raises(UserError, match="^--load .*typo has no checkpoint: give the directory"):
        start("--load", tmp_path / "typo", *more)


def test_a_pretrained_checkpoint_that_is_not_there(start, tmp_path):
    with pytest.raises(UserError, match="^--pretrained-checkpoint gone has no checkpoint"):
        start("--pretrained-checkpoint", "gone", "--load", tmp_path / "new")


def test_a_resume_takes_the_latest(start, run):
    directory, args = start("--load", run, "--save", run)
    assert directory == run and args.ckpt_step is None and not args.finetune
    assert start("--load", run)[0] == run


def test_a_new_run_begins_from_a_converted_model(start, run, tmp_path):
    """--finetune is not needed: Megatron loads a release as if the flag were given."""
    release(run)
    flags = ["--load", run, "--save", tmp_path / "new"]
    directory, args = start(*flags)
    assert directory == run and args.finetune
    # When the command is repeated, the run goes on from its own checkpoints.
    shutil.copytree(unpack("mirror", tmp_path / "mirror"), tmp_path / "new")
    saved_by(args, tmp_path / "new")
    directory, args = start(*flags)
    assert directory == str(tmp_path / "new") and not args.finetune


def other_start() -> None:
    """Runs the program, but the last rank would begin a new run where the others resume."""
    choose = arguments_module.choose_start

    def chosen(args):
        found = choose(args)
        arguments = {**found.arguments, "finetune": os.environ["RANK"] == "1"}
        return dataclasses.replace(found, arguments=arguments)

    arguments_module.choose_start = chosen
    main()


def test_ranks_that_would_start_from_elsewhere_stop(base, tmp_path):
    """A shared disk may not show the same files to all nodes at once."""
    launched = ranks.launch(tmp_path, 2, *base, entry=other_start, check=False)
    assert 2 in launched.status and 0 not in launched.status
    message = "error: the ranks see different checkpoints: this one would start from "
    assert message in "".join(launched.output)


# -- what is saved over


def test_without_load_a_run_is_not_saved_over(start, run):
    with pytest.raises(UserError) as caught:
        start("--save", run)
    assert str(caught.value) == (
        f"--save {run} holds iteration 6 of a run that this command does not continue: give --load "
        f"{run} to go on from it, or give another --save (--mdm-overwrite-save saves over it)"
    )
    assert start("--save", run, "--mdm-overwrite-save")[0] is None
    with pytest.raises(UserError, match="give --load"):
        start("--save", run, "--pretrained-checkpoint", run)


def test_another_run_is_not_saved_over(start, run, tmp_path):
    other = another(run, tmp_path)
    with pytest.raises(UserError, match=f"^--save {other} holds iteration 6 of a run that this"):
        start("--load", run, "--save", other)
    with pytest.raises(UserError, match=f"^--save {other} holds iteration 6 of a run that this"):
        start("--load", run, "--save", other, "--finetune")
    assert start("--load", run, "--save", other, "--mdm-overwrite-save")[0] == run


def test_fine_tuning_does_not_save_over_what_it_starts_from(start, run):
    with pytest.raises(UserError, match="does not continue: leave out --finetune to go on from"):
        start("--load", run, "--save", run, "--finetune")
    release(run)  # a release has no numbered iteration to lose
    directory, args = start("--load", run, "--save", run, "--finetune")
    assert directory == run and args.finetune


def test_an_earlier_iteration_goes_back_with_a_line(start, run, capfd):
    directory, args = start("--load", run, "--save", run, "--ckpt-step", 3)
    assert directory == run and args.ckpt_step == 3
    assert "--ckpt-step 3 goes back from iteration 6" in capfd.readouterr().out
    assert start("--load", run, "--ckpt-step", 3)[1].ckpt_step == 3


def test_what_a_killed_run_has_left_is_named(start, run, capfd):
    """A save that was killed, and a deletion that was."""
    shutil.copytree(f"{run}/iter_0000006", f"{run}/iter_0000009")
    os.unlink(f"{run}/iter_0000009/metadata.json")
    os.unlink(f"{run}/iter_0000003/.metadata")
    assert start("--load", run, "--save", run)[0] == run
    line = f"--save {run} holds unfinished checkpoints of a killed run, iter_0000003, iter_0000009:"
    assert line in capfd.readouterr().out
    for name in ("iter_0000003", "iter_0000009"):
        shutil.rmtree(f"{run}/{name}")
    assert start("--load", run, "--save", run)[0] == run
    assert "unfinished" not in capfd.readouterr().out


def test_evaluation_alone_saves_nothing_and_looks_at_no_save_directory(start, run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / TRACKER).write_text("")
    flags = ["--load", run, "--save", tmp_path / "other"]
    with pytest.raises(UserError, match="is damaged, it holds ''"):
        start(*flags)
    assert start(*flags, "--skip-train")[0] == run
    assert start(*flags, "--mdm-overwrite-save")[0] == run  # whatever the directory holds


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--finetune"],
        ["--ckpt-step", 3],
        ["--ckpt-step", 3, "--finetune"],
        ["--no-load-optim", "--no-load-rng"],
    ],
)
def test_the_same_command_given_again_goes_on(flags, start, run, tmp_path, capfd):
    """A scheduler repeats a command: the run starts from --load, then from its own latest."""
    other = tmp_path / "other"
    command = ["--load", run, "--save", other, *flags]
    directory, args = start(*command)
    assert directory == run
    saved_by(args, another(run, tmp_path))
    for _ in range(2):
        directory, args = start(*command)
        assert directory == args.load == str(other)
        assert (args.ckpt_step, args.finetune) == (None, False)
        assert not args.no_load_optim and not args.no_load_rng  # the state is its own now
        assert "the run goes on from there" in capfd.readouterr().out
        saved_by(args, other)
    # A command with another start is another run.
    other_flags = ["--ckpt-step", 6] if "--ckpt-step" in flags else [*flags, "--ckpt-step", 6]
    with pytest.raises(UserError, match="of a run that this command does not continue"):
        start("--load", run, "--save", other, *other_flags)


def test_the_same_command_that_went_back_goes_on(start, run, tmp_path, capfd):
    command = ["--load", run, "--save", run, "--ckpt-step", 3]
    _, args = start(*command)
    saved_by(args, tmp_path / "checkpoint")
    _, args = start(*command)
    assert args.ckpt_step is None
    assert "the run goes on from there" in capfd.readouterr().out
    assert start(*command, "--mdm-overwrite-save")[1].ckpt_step == 3


def test_the_same_command_without_the_optimizer_of_before_goes_on_with_its_own(
    start, run, tmp_path, capfd
):
    command = ["--load", run, "--save", run, "--no-load-optim"]
    _, args = start(*command)
    assert args.no_load_optim and "goes back" not in capfd.readouterr().out
    saved_by(args, tmp_path / "checkpoint")
    _, args = start(*command)
    assert not args.no_load_optim
    assert "the run goes on from there" in capfd.readouterr().out
    # The flag may be left out as well.
    assert not start(*command[:-1])[1].no_load_optim


def test_the_same_command_with_a_pretrained_checkpoint(start, run, tmp_path):
    new = tmp_path / "new"
    command = ["--pretrained-checkpoint", run, "--load", new, "--save", new, "--ckpt-step", 3]
    directory, args = start(*command)
    assert directory == run and args.ckpt_step == 3
    args.finetune = True  # as Megatron sets it
    saved_by(args, another(run, tmp_path, "new"))
    directory, args = start(*command)
    assert directory == str(new) and args.ckpt_step is None and not args.finetune


def test_checkpoints_of_be7fed4_say_how_their_run_began(start, run, tmp_path):
    """Their arguments have no record of the start, but they name --load and --save."""
    saved = load_common_state_dict(f"{run}/iter_0000006")["args"]
    assert not hasattr(saved, "mdm_started_from")
    saved.load, saved.finetune = run, True
    other = another(run, tmp_path)
    saved_by(saved, other)
    assert start("--load", run, "--save", other, "--finetune")[1].load == str(other)


# -- one run at a time


HOLDER = """
import sys
from megatron_mdm.mcore.checkpoint.run_lock import only_writer
with only_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a directory until it is told to end."""
    save = tmp_path / "save"
    command = [sys.executable, "-c", HOLDER, str(save)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert process.stdout.readline().strip().endswith("held")
    yield save, process
    process.kill()
    process.communicate()


def test_a_second_run_names_the_first(holder):
    save, process = holder
    line = f"use by another run .*process {process.pid}, since 20"
    with pytest.raises(UserError, match=line), only_writer(str(save)):
        pass
    process.communicate("\n")
    assert not save.exists()  # because nothing was saved
    with only_writer(str(save)):
        assert (save / LOCK).exists()


def test_a_killed_run_holds_nothing(holder):
    save, process = holder
    process.kill()
    process.wait()
    assert (save / LOCK).exists()
    with only_writer(str(save)):
        pass


def test_children_of_a_run_hold_nothing(tmp_path):
    """Loader workers and checkpoint writers may outlive a rank that was killed."""
    with only_writer(str(tmp_path)):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    forked = os.fork()
    if not forked:
        try:
            with only_writer(str(tmp_path)):
                os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(forked, 0)[1] == 0
    child.communicate(b"\n")


def test_the_line_says_how_to_go_on_after_a_node_that_is_gone(holder):
    """A file server may keep the lock of such a node."""
    save, _ = holder
    line = f"if that run is gone, delete {save / LOCK}"
    with pytest.raises(UserError, match=line) as caught, only_writer(str(save)):
        pass
    os.unlink(str(caught.value).rpartition("delete ")[2].removesuffix(")"))
    with only_writer(str(save)):
        pass


def test_another_failure_is_not_called_another_run(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.lockf", fail)
    line = f"{LOCK} cannot be locked: Input/output error"
    with pytest.raises(UserError, match=line), only_writer(str(tmp_path)):
        pass


def test_a_directory_that_was_there_stays(tmp_path):
    with only_writer(str(tmp_path)):
        pass
    assert tmp_path.is_dir() and not os.listdir(tmp_path)


def test_other_ranks_and_runs_that_save_nothing_need_no_lock(holder, monkeypatch):
    save, _ = holder
    monkeypatch.setattr(sys, "argv", ["pretrain", "--save", str(save), "--skip-train"])
    with only_writer(requested_save()):
        pass
    with only_writer(None):
        pass
    monkeypatch.setenv("RANK", "1")
    with only_writer(str(save)):
        pass


# -- the program


def test_a_command_that_is_given_again_trains_each_row_once(base, tmp_path):
    """The command has --load of another run and --save, and stops once in between."""
    flags = [*base, "--save", str(tmp_path / "save"), "--save-interval", "2", "--train-iters", "4"]
    first = ranks.launch(tmp_path / "first", 1, *flags, "--exit-interval", "2")
    again = ranks.launch(tmp_path / "again", 2, *flags)
    assert not first.masks().keys() & again.masks().keys()
    whole = ranks.launch(tmp_path / "whole", 1, *flags[: len(base)], "--train-iters", "4")
    assert first.masks() | again.masks() == whole.masks()
    assert "the run goes on from there" in again.output[0]
    assert (tmp_path / "save" / TRACKER).read_text() == "4"
    assert find_checkpoint(str(tmp_path / "save")).iteration == 4


@pytest.mark.parametrize("count", [1, 2])
def test_a_flipped_bit_ends_a_resume_in_one_line(count, base, tmp_path):
    """The bit is in Adam's moments, which only a resume reads."""
    flags = [*base[: base.index("--load")], "--save", str(tmp_path / "save"), "--save-interval"]
    flags += ["2", "--load", str(tmp_path / "save")]
    ranks.launch(tmp_path / "first", 2, *flags, "--exit-interval", "2")
    files = sorted((tmp_path / "save/iter_0000002").glob("*.distcp"))
    with open(files[-1], "r+b") as file:
        file.seek(files[-1].stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    run = ranks.launch(tmp_path / "again", count, *flags, check=False)
    lines = [line for line in "".join(run.output).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"is damaged: {files[-1].name} is not as it was saved" in lines[0]
    assert run.status[0] == 2
    if count == 1:
        skipped = ranks.launch(tmp_path / "skipped", 1, *flags, "--no-mdm-checkpoint-hashes")
        assert len(skipped.losses) == 3
