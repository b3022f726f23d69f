"""The program ends with one clear line and a status other than 0, and leaves no rank waiting."""

import os
import subprocess
import sys

import pytest
import torch
from megatron.training.training import destroy_global_state

from megatron_mdm import pretrain
from tests import ranks
from tests.mcore.flags.parsing import COMMON, FITTED


def run_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["pretrain", *argv])
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # so that main's change is undone
    with pytest.raises(SystemExit) as caught:
        pretrain.main()
    return caught.value.code


def test_no_gpu_names_the_flag(monkeypatch, capfd):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_main(monkeypatch, *ranks.MODEL) == 2
    assert "add --mdm-device cpu" in ranks.the_error_line(capfd.readouterr())


@pytest.fixture
def words(tmp_path):
    """A function that completes flags of a run that saves, with the paths of data files."""
    names = {name: str(tmp_path / name) for name in ("files", "short", "none")}
    ranks.write_documents(tmp_path / "files", [[5] * 30, [6] * 4, [7] * 40])
    os.truncate(tmp_path / "files.bin", 148)
    ranks.write_documents(tmp_path / "short", [[5] * 30, [6], [7] * 40])
    ranks.write_documents(tmp_path / "none", [[5] * 30, [6] * 4, [7] * 40])

    def complete(flags, message):
        found = flags.format(**names).split()
        if "--data-path" not in found:
            found.append("--mock-data")
        if "--split" not in found:
            found += ["--split", "67,33,0" if "{none}" not in flags else "67,32,1"]
        found += ["--eval-iters", "1", "--save", str(tmp_path / "checkpoint")]
        return [*found, "--save-interval", "1"], message.format(**names)

    return complete


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mdm-quantiles sobol", "argument --mdm-quantiles: invalid choice: 'sobol'"),
        (
            "--tokenizer-type SentencePieceTokenizer --tokenizer-model missing.model",
            "--tokenizer-model missing.model does not exist: give the path of its file",
        ),
        # Of 3 documents, 2 are for training and 1 is for validation; none is left for the test
        # split.
        ("--data-path {short}", "the train split of {short} has 31 tokens, fewer than one row"),
        ("--data-path {none}", "the test split of {none} has 0 tokens, fewer than one row"),
    ],
)
def test_mistakes_end_the_program(flags, message, words, tmp_path):
    flags, message = words(flags, message)
    run = ranks.launch(tmp_path / "run", 1, *flags, check=False)
    assert run.status == [2]
    assert message in ranks.the_error_line(run.output)
    assert not list(tmp_path.rglob("checkpoint/*"))


@pytest.fixture
def forgets_megatron():
    """Resets Megatron's globals, so that a later test finds them as this one did."""
    yield
    destroy_global_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("forgets_megatron")
@pytest.mark.parametrize(
    ("flags", "drop", "message"),
    [
        ("--mdm-mask-token-id 128", [], "--mdm-mask-token-id 128 lies outside the vocabulary"),
        ("", ["--mdm-mask-token-id"], "the tokenizer NullTokenizer has no mask piece"),
        (
            "--step-batch-size-schedule abc --train-samples 80 --eval-global-batch-size 8",
            ["--global-batch-size", "--train-iters"],
            "Megatron rejects these flags or their files: Invalid schedule entry",
        ),
        ("--mdm-isad-token-ids 3 500", [], "--mdm-isad-token-ids 500 lies outside the vocabulary"),
        (FITTED, [], "cannot read the rate density x.json (No such file or directory): give"),
        ("--num-attention-heads 5", [], "Megatron rejects these flags or their files: "),
        (
            "--recompute-granularity selective --recompute-modules mla_up_proj",
            [],
            "Megatron rejects these flags or their files: mla_up_proj in recompute_modules is only",
        ),
        (
            "--mdm-rate-per document --data-path {short}",
            [],
            "no document at the beginning of {short}.bin ends with the tokenizer's end",
        ),
        (
            "--num-experts 4 --moe-layer-freq [0,1,1]",
            [],
            "Megatron rejects these flags or their files: Invalid length of moe_layer_pattern: 3",
        ),
        (
            "--num-experts 4 --moe-token-dispatcher-type flex",
            [],
            "Megatron rejects these flags or their files: DeepEP dispatcher requires TPxEP > 1",
        ),
        ("--data-path {files}", [], "{files}.bin has 148 bytes where its index says 296"),
        # Megatron's log writer fails on this, and only on the last rank.
        (
            "--tensorboard-dir /proc/nowhere/logs",
            [],
            "--tensorboard-dir /proc/nowhere/logs cannot be written: No such file or directory",
        ),
        ("--data-path {short} --split 1,0,0", [], "--eval-iters 1 needs validation rows, and --sp"),
    ],
)
def test_mistakes_are_seen_before_the_training(
    flags, drop, message, words, tmp_path, monkeypatch, capfd
):
    """The program runs in this process, where by then at most a group of one rank may exist."""
    flags, message = words(flags, message)
    common = list(COMMON)
    for flag in drop:
        del common[common.index(flag) : common.index(flag) + 2]
    assert run_main(monkeypatch, *common, *flags) == 2
    assert message in ranks.the_error_line(capfd.readouterr())
    assert not list(tmp_path.rglob("checkpoint/*"))


def test_a_mistake_of_all_ranks_is_printed_once(tmp_path):
    run = ranks.launch(tmp_path, 2, "--data-path", str(tmp_path / "nothing"), check=False)
    assert run.status[0] == 2 and run.status[1] != 0
    assert "nothing.bin does not exist" in ranks.the_error_line(run.output)


def test_a_launcher_does_not_repeat_bad_input(tmp_path):
    """A restart cannot help, so the error line is not repeated and the run is not restarted."""
    torchrun = ["megatron_mdm.launch" if "torch" in word else word for word in ranks.TORCHRUN]
    command = [
        *[sys.executable, *torchrun, "--max-restarts", "2", "-m", "megatron_mdm.pretrain"],
        *[*COMMON, "--data-path", str(tmp_path / "nothing")],
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 2
    assert run.stderr.count("error: ") == 1, run.stderr[-3000:]
    assert "nothing.bin does not exist" in run.stderr.splitlines()[-1]


# Each document is one row. In Megatron's row order, this one is read by rank 1 in the first step.
ROW_OF_RANK_1 = 8


@pytest.mark.parametrize(
    ("launcher", "workers"),
    [("torch.distributed.run", 0), ("torch.distributed.run", 1), ("megatron_mdm.launch", 1)],
)
def test_one_rank_fails_while_the_other_waits(launcher, workers, tmp_path):
    """Uses a real launcher: rank 1 reads a mask token while rank 0 waits for its gradients."""
    documents = [[5] * 32 for _ in range(40)]
    documents[ROW_OF_RANK_1][9] = ranks.MASK_ID
    ranks.write_documents(tmp_path / "text", documents)
    torchrun = [launcher if "torch" in word else word for word in ranks.TORCHRUN]
    command = [
        *[sys.executable, *torchrun],
        *["-m", "megatron_mdm.pretrain", *COMMON, "--split", "1,0,0", "--mdm-row-order", "run"],
        *["--data-path", str(tmp_path / "text"), "--num-workers", str(workers)],
        *["--save", str(tmp_path / "checkpoint"), "--save-interval", "1"],
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode != 0
    message = f"of the train data contains the mask token {ranks.MASK_ID} at position 9"
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    is_ours = launcher == "megatron_mdm.launch"
    # Our launcher repeats the line if rank 0 printed another one, so that this line is the last.
    assert lines in [lines[:1]] + [lines[:1] * 2] * is_ours, run.stderr[-3000:]
    assert lines[0].startswith("error: rank 1: row ") and message in lines[0]
    # Rank 0 has lost its connection by then, or is stopped before it notices. Our ranks show no
    # traceback, and torchrun has none of theirs to show.
    assert "megatron_mdm/pretrain.py" not in run.stderr
    if is_ours:
        assert run.returncode == 2 and run.stderr.splitlines()[-1] == lines[0]
        assert "Traceback" not in run.stderr and "closing signal" not in run.stderr
    else:  # torchrun's report is last and shows this rank's message
        report = run.stderr[run.stderr.rindex("Root Cause") :]
        assert "rank      : 1 " in report and f"traceback : {lines[0][7:]}" in report
    assert not list(tmp_path.rglob("checkpoint/iter_*"))
