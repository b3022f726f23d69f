"""A converted model trains with its launch line, and its checkpoints can be moved anywhere."""

import json
import os
import re
import shlex
import shutil
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from megatron_mdm.conversion.safetensors_model import copy_side_files
from megatron_mdm.conversion.to_hugging_face import to_hugging_face
from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.data.fingerprint import fingerprint
from megatron_mdm.data.load_tokenizer import load_hugging_face
from megatron_mdm.data.preprocess import preprocess
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint import kept_tokenizer
from megatron_mdm.mcore.checkpoint.files import TRACKER
from megatron_mdm.mcore.checkpoint.kept_tokenizer import tokenizer_files
from megatron_mdm.mcore.checkpoint.tokenizer_lookup import check_tokenizer_path, tokenizer_of
from tests import ranks
from tests.conversion import models
from tests.ranks import entries

WORDS = {f"w{i}": i for i in range(80)} | {"<unk>": 80, "end": 81, "<|mdm_mask|>": 90}
SPECIAL = {"eos_token": "end", "mask_token": "<|mdm_mask|>"}
OWN = ["config.json", "tokenizer.json", "tokenizer_config.json"]


def write_data(directory):
    """Writes text.jsonl, and text.bin and text.idx of it, with the tokenizer in `directory`."""
    lines = [" ".join(f"w{(7 * i + j * j) % 80}" for j in range(40)) for i in range(300)]
    file = directory / "text.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenizer = load_hugging_face(str(directory / "mg" / "huggingface"))
    preprocess([str(file)], str(directory / "text"), tokenizer, workers=1, progress=False)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A run by a conversion's launch line, moved with its data to another place.

    At the old place, another tokenizer with as many tokens replaces the original, and a file
    replaces the directory of the run's index cache.
    """
    old = tmp_path_factory.mktemp("old")
    source = models.make("llada", old / "hf")
    models.write_tokenizer(source, WORDS, **SPECIAL)
    (source / "LICENSE").write_text("as you like")
    to_megatron(str(source), str(old / "mg"), log=str)
    write_data(old)
    line = (old / "mg" / "launch.txt").read_text().replace("\\\n", "")
    words = shlex.split(line.replace("MY_RUN", str(old / "run")).replace("MY_DATA", f"{old}/text"))
    flags = words[words.index("megatron_mdm.pretrain") + 1 :]
    flags += "--mdm-device cpu --num-workers 0 --exit-interval 2 --global-batch-size 2".split()
    flags += ["--data-cache-path", str(old / "cache")]
    run = ranks.launch(old / "log", 1, "--", *flags, entry=entries.only_these_flags)
    new = tmp_path_factory.mktemp("new")
    for name in ("run", "text.jsonl", "text.bin", "text.idx", "text.json"):
        shutil.move(old / name, new / name)
    shutil.rmtree(old / "hf")
    shutil.rmtree(old / "cache")
    (old / "cache").touch()
    tokenizer = old / "mg" / "huggingface"
    models.write_tokenizer(tokenizer, WORDS | {"w7": 8, "w8": 7}, **SPECIAL)
    return SimpleNamespace(run=new / "run", data=new, old=old, flags=flags, log=run)


def write_hub(directory, tokenizer):
    """A cache of huggingface_hub that holds a tokenizer under the name me/tok."""
    repository = directory / "hub" / "models--me--tok"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tokenizer, repository / "snapshots" / ("0" * 40))


def tool(moved, directory, name, *flags):
    """The stdout of a tool that starts in a directory of its own."""
    words = [f"tools/{name}.py", "--device", "cpu", "--load", str(moved.run), *flags]
    ranks.launch(directory / name, 1, "--", *words, entry=entries.tool_in_its_directory)
    return (directory / name / "stdout0").read_text()


def test_the_line_of_a_conversion_trains_as_it_stands(moved):
    """Schedule, validation and saving come from the line; batch, device, loaders and end do not."""
    assert "lr_decay_style .................................. cosine" in moved.log.output[0]
    tracker = moved.run / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "2"


def test_the_tokenizer_lies_beside_the_checkpoints(moved):
    files = sorted(os.listdir(moved.run / "huggingface"))
    assert files == sorted([*OWN, "LICENSE"])
    assert not list(moved.run.glob("huggingface.*"))


def test_tools_need_nothing_of_the_original_place(moved, tmp_path):
    prompt = ["--prompt", "w1 w7", "--length", "4", "--no-stop-at-eos"]
    assert tool(moved, tmp_path, "generate", *prompt).startswith("w1 w7 ")
    text = tool(moved, tmp_path, "evaluate", "--data", str(moved.data / "text.jsonl"), "--rows=9")
    assert "NELBO" in text
    data = ["--data-path", str(moved.data / "text"), "--rows", "2", "--masks", "2"]
    fit = tool(moved, tmp_path, "fit_ppots", *data, "--output", "fit.json")
    assert "fit of the loss" in fit and (tmp_path / "fit_ppots" / "fit.json").exists()


def test_it_converts_back(moved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    to_hugging_face(str(moved.run), "back", verify=True, log=str)
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        written = (tmp_path / "back" / name).read_bytes()
        assert written == (moved.run / "huggingface" / name).read_bytes()


def only_these_flags_with_a_hub() -> None:
    """Runs `entries.only_these_flags` with a cache of the hub beside the run's log directory.

    The variable is replaced in the library, because the fork server has imported it, and the
    library reads the environment only then.
    """
    constants.HF_HUB_CACHE = str(Path(os.environ["TRACE_DIR"]).parent / "hub")
    constants.HF_HUB_OFFLINE = True
    entries.only_these_flags()


def test_it_resumes(moved, tmp_path):
    """It resumes with the copy's path, and with --use-checkpoint-args, which takes the copy."""
    run = shutil.copytree(moved.run, tmp_path / "run")
    flags = [word.replace(f"{moved.old}/run", str(run)) for word in moved.flags]
    flags = [word.replace(f"{moved.old}/text", f"{moved.data}/text") for word in flags]
    flags[flags.index("--data-cache-path") + 1] = str(tmp_path / "cache")
    del flags[flags.index("--exit-interval") : flags.index("--exit-interval") + 2]
    place = flags.index("--tokenizer-model") + 1
    gone = str(tmp_path / "gone")

    def resume(tokenizer, *more, **settings):
        command = [*flags[:place], tokenizer, *flags[place + 1 :], *more]
        return ranks.launch(
            tmp_path / "log", 1, "--", *command, entry=only_these_flags_with_a_hub, **settings
        )

    output = resume(gone, "--exit-interval", "3", check=False).output[0]
    line = f"error: --tokenizer-model {gone} does not exist: give the copy beside the checkpoint, "
    assert f"{line}--tokenizer-model {run / 'huggingface'}" in output
    output = resume("not/there", "--exit-interval", "3", check=False).output[0]
    line = "error: --tokenizer-model not/there does not exist, and transformers finds no tokenizer "
    assert f"{line}of this name: give the copy beside the checkpoint, --tok" in output
    other = str(moved.old / "mg" / "huggingface")
    output = resume(other, "--exit-interval", "3", check=False).output[0]
    assert "was trained with another tokenizer: its ids below 82 stand for other" in output
    write_hub(tmp_path, run / "huggingface")
    for number, tokenizer, more in (
        (3, str(run / "huggingface"), []),
        (4, other, ["--use-checkpoint-args"]),
        (5, "me/tok", []),  # a name on the hub; a copy is beside the checkpoints
    ):
        resume(tokenizer, "--exit-interval", str(number), *more)
        assert (run / "latest_checkpointed_iteration.txt").read_text() == str(number)


# -- the copy


@pytest.fixture
def keeping(tmp_path):
    """A tokenizer's files, and a directory of checkpoints that gets their copy."""
    source = tmp_path / "source"
    models.write_tokenizer(source, WORDS, **SPECIAL)
    for name in (
        "model.safetensors",
        "corpus.json",
        ".hidden.json",
        "model.safetensors.index.json",
    ):
        (source / name).write_text("not a tokenizer's")
    (source / "code.py").write_text("")
    (tmp_path / "run").mkdir()

    def files(path=source, kind="HuggingFaceTokenizer"):
        args = Namespace(tokenizer_type=kind, tokenizer_model=str(path), skip_train=False)
        args.save = str(tmp_path / "run")
        return tokenizer_files(args)

    return files, source, tmp_path / "run"


def names(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def test_only_what_belongs_to_a_tokenizer_is_copied(keeping):
    files, source, run = keeping
    files().keep(run)
    copies = ["code.py", "tokenizer.json", "tokenizer_config.json"]
    assert names(run) == ["huggingface", *(f"huggingface/{name}" for name in copies)]
    assert all(
        (run / "huggingface" / name).read_bytes() == (source / name).read_bytes() for name in copies
    )
    before = (run / "huggingface").stat().st_ino
    files().keep(run)
    assert (run / "huggingface").stat().st_ino == before


def test_a_tokenizer_that_has_changed_or_gone_is_not_copied(keeping, capfd):
    files, source, run = keeping
    found = files()
    (source / "tokenizer.json").write_text("{}")
    found.keep(run)
    (source / "tokenizer.json").unlink()
    found.keep(run)
    assert names(run) == []
    line = f"the tokenizer {source} is not what it was when the run began: no copy of it goes into"
    assert capfd.readouterr().out.count(line) == 2


def test_another_one_takes_its_place(keeping, capfd):
    """A run that is allowed to save there has another tokenizer."""
    files, source, run = keeping
    files().keep(run)
    (run / TRACKER).write_text("1")
    (source / "tokenizer.json").write_text("{}")
    (source / "code.py").unlink()
    files().keep(run)
    assert "gives way to that of this run" in capfd.readouterr().out
    assert (run / "huggingface" / "tokenizer.json").read_text() == "{}"
    assert names(run / "huggingface") == ["tokenizer.json", "tokenizer_config.json"]
    assert names(run)[0] == "huggingface"
    (run / "huggingface" / "chat_template.jinja").write_text("another's")
    files().keep(run)
    assert names(run / "huggingface") == ["tokenizer.json", "tokenizer_config.json"]


def test_a_converted_model_keeps_its_own(keeping):
    files, _, run = keeping
    (run / "release").mkdir()
    (run / "huggingface").mkdir()
    files().keep(run)
    assert names(run) == ["huggingface", "release"]


def test_a_single_file(keeping):
    files, source, run = keeping
    model = source / "my.model"
    for content in ("one", "two"):
        model.write_text(content)
        files(model, "SentencePieceTokenizer").keep(run)
        assert (run / "tokenizer.model").read_text() == content
        (run / TRACKER).write_text("1")
    assert names(run) == [TRACKER, "tokenizer.model"]


def put_model(run):
    (run / TRACKER).write_text("1")
    (run / "huggingface").mkdir()
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (run / "huggingface" / name).write_text("{}")
    return f"{run}/huggingface/model.safetensors is no tokenizer's file"


def put_template(run):
    put_model(run)
    shutil.rmtree(run / "huggingface")
    (run / "huggingface" / "additional_chat_templates").mkdir(parents=True)
    (run / "huggingface" / "additional_chat_templates" / "notes.txt").write_text("mine")
    return f"{run}/huggingface/additional_chat_templates/notes.txt is no tokenizer's file"


def put_first(run):
    (run / "huggingface").mkdir()
    (run / "huggingface" / "tokenizer.json").write_text("{}")
    return f"{run}/huggingface is there, with other contents, before any checkpoint is"


def put_link(run):
    (run / TRACKER).write_text("1")
    (run / "elsewhere").mkdir()
    (run / "huggingface").symlink_to(run / "elsewhere")
    return f"{run}/huggingface is a link"


def put_dangling_link(run):
    (run / TRACKER).write_text("1")
    (run / "huggingface").symlink_to(run / "nowhere")
    return f"{run}/huggingface is a link"


def put_file(run):
    (run / TRACKER).write_text("1")
    (run / "huggingface").write_text("notes")
    return f"{run}/huggingface is a file"


@pytest.mark.parametrize(
    "put", [put_model, put_template, put_first, put_link, put_dangling_link, put_file]
)
def test_nothing_but_a_copy_is_replaced(put, keeping, capfd):
    """A run refuses other files at its start. Files that come later stay, without a copy."""
    files, _, run = keeping
    found = files()
    line = put(run)
    before = names(run)
    with pytest.raises(UserError, match=re.escape(f"--save {run}: {line}, and the run keeps")):
        files()
    found.keep(run)
    assert f"{line}: no copy of the tokenizer" in capfd.readouterr().out
    assert names(run) == before


def test_a_file_that_no_run_has_put_there_stays(keeping):
    files, source, run = keeping
    (source / "my.model").write_text("one")
    (run / "tokenizer.model").write_text("mine")
    with pytest.raises(UserError, match="tokenizer.model is there, with other contents, before"):
        files(source / "my.model", "SentencePieceTokenizer")
    assert (run / "tokenizer.model").read_text() == "mine"


def test_the_original_may_lie_at_the_place_of_the_copy(keeping):
    """A model beside the tokenizer stays too, and so do files that appear later."""
    files, source, run = keeping
    shutil.copytree(source, run / "huggingface")
    found = files(run / "huggingface")
    (run / "huggingface" / "chat_template.jinja").write_text("new")
    before = names(run)
    found.keep(run)
    assert names(run) == before


def test_named_chat_templates_are_copied(keeping):
    from transformers import AutoTokenizer

    files, source, run = keeping
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    tokenizer.save_pretrained(source)
    files().keep(run)
    copy = AutoTokenizer.from_pretrained(run / "huggingface")
    assert copy.chat_template == tokenizer.chat_template
    before = (run / "huggingface").stat().st_ino
    files().keep(run)
    assert (run / "huggingface").stat().st_ino == before
    copy_side_files(source, run)
    assert (run / "additional_chat_templates" / "tool_use.jinja").read_text() == "T"


@pytest.mark.parametrize(
    "name", ["tekken.json", "source.spm", "dict.txt", "bpe.codes", "entity_vocab.json"]
)
def test_files_of_other_tokenizers_are_copied(name, keeping):
    files, source, run = keeping
    (source / name).write_text("")
    files().keep(run)
    assert (run / "huggingface" / name).exists()


# -- the tokenizer of --tokenizer-model


@pytest.fixture
def given(keeping):
    """Arguments of a run that loads from a directory with a copy of the tokenizer."""
    files, source, run = keeping
    files().keep(run)
    shutil.copy(source / "tokenizer.json", run / "tokenizer.model")

    def arguments(path, kind="HuggingFaceTokenizer"):
        args = Namespace(tokenizer_type=kind, tokenizer_model=str(path), load=str(run))
        args.use_checkpoint_args = args.pretrained_checkpoint = None
        return args

    return arguments


@pytest.mark.parametrize("name", ["org/name", "name", "org/name-1.5_b"])
def test_a_name_on_the_hub_is_no_path(name, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_tokenizer_path(given(name))


@pytest.mark.parametrize("name", ["/a/b", "./a", "../a", "a/b/c", "a b", "a--b", "~/a"])
def test_a_path_that_is_not_there_is_no_name_on_the_hub(name, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = f"--tokenizer-model {name} does not exist: give the copy .*/run/huggingface"
    with pytest.raises(UserError, match=line):
        check_tokenizer_path(given(name))


def test_a_file_is_a_path(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="my.model does not exist: give the copy .*tokenizer.model"):
        check_tokenizer_path(given("my.model", "SentencePieceTokenizer"))


# -- another tokenizer in one directory of checkpoints


def test_checkpoints_from_before_a_change_have_the_original(keeping):
    """The copy is of the later tokenizer. If the original is gone, the copy is the only choice."""
    files, source, run = keeping
    other = run.parent / "other"
    models.write_tokenizer(other, WORDS | {"w7": 8, "w8": 7}, **SPECIAL)
    args = {}
    for path in (source, other):
        files(path).keep(run)
        (run / TRACKER).write_text("1")
        known = asdict(fingerprint(load_hugging_face(str(path))))
        args[path] = Namespace(
            tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(path), mdm_tokenizer=known
        )
    copy = str(run / "huggingface")
    assert tokenizer_of(str(run), args[source]) == str(source)
    assert tokenizer_of(str(run), args[other]) == copy
    models.write_tokenizer(other, WORDS | {"w1": 2, "w2": 1}, **SPECIAL)
    assert tokenizer_of(str(run), args[other]) == copy
    shutil.rmtree(source)
    assert tokenizer_of(str(run), args[source]) == copy


def test_a_directory_of_data_is_not_copied(keeping, monkeypatch, capfd):
    files, source, _ = keeping
    monkeypatch.setattr(kept_tokenizer, "MOST_BYTES", 1000)
    assert files() is None
    assert f"the tokenizer {source} has 0.0 GB of files: no copy" in capfd.readouterr().out


def test_a_full_disk_is_one_line(keeping, monkeypatch):
    files, _, run = keeping

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_tokenizer, "copyfile", fail)
    with pytest.raises(UserError, match="cannot write .*huggingface: No space left on device"):
        files().keep(run)
    assert names(run) == []


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_model": None},
        {"tokenizer_type": "NullTokenizer"},
        {"save": None},
        {"save": "s3://bucket/run"},
        {"skip_train": True},
    ],
)
def test_nothing_to_keep(change):
    args = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "my.model"}
    assert (
        tokenizer_files(Namespace(**{**args, "save": "run", "skip_train": False, **change})) is None
    )
