"""Data and tokenizer are recognised by their content, whatever their files are called."""

import json
import os
import shutil
from argparse import Namespace

import pytest

from megatron_mdm.data.load_tokenizer import load_sentencepiece
from megatron_mdm.data.preprocess import preprocess
from megatron_mdm.data.tokenizer import train_tokenizer
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.flags.identities import check_same_data, identities
from tests import ranks
from tests.ranks import entries

DOCUMENTS = ranks.random_documents(60, seed=3)


def the_error(run):
    lines = [line for line in "".join(run.output).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, run.output[0][-2000:]
    return lines[0]


@pytest.fixture
def run(tmp_path):
    """A function that runs the program on `text`, with its index cache beside it."""
    cache = ["--data-cache-path", str(tmp_path / "cache"), "--train-iters", "4"]

    def launch(name, *flags, count=1, data=("text",), **settings):
        paths = [str(tmp_path / word) if not word[0].isdigit() else word for word in data]
        return ranks.launch(
            tmp_path / name, count, *cache, "--data-path", *paths, *flags, **settings
        )

    return launch


def tokens(run):
    """Row -> its masked tokens."""
    return {row: masked for row, (_, masked) in run.masks().items()}


# -- the index cache


def test_data_that_were_replaced_are_read_anew(run, tmp_path):
    """The new data have the same name and as many documents, so Megatron would not notice."""
    ranks.write_documents(tmp_path / "text", DOCUMENTS)
    before = run("before")
    again = run("again")
    assert tokens(again) == tokens(before)
    names = sorted(os.listdir(tmp_path / "cache"))
    ranks.write_documents(tmp_path / "text", [[7] * len(d) for d in DOCUMENTS])
    after = run("after")
    assert all(set(row) <= {7, ranks.MASK_ID} for row in tokens(after).values())
    assert len(os.listdir(tmp_path / "cache")) == 2 * len(names)


@pytest.mark.parametrize("data", [("text",), ("0.5", "text", "0.5", "more")])
def test_an_index_that_was_cut_short_is_made_anew(data, run, tmp_path):
    """Cuts every file of the index, in three ways by turns. Two ranks wait for the first."""
    for name in ("text", "more"):
        ranks.write_documents(tmp_path / name, DOCUMENTS)
    expected = tokens(run("before", data=data, count=2))
    files = sorted((tmp_path / "cache").glob("*train*.npy"))
    assert len(files) == (3 if len(data) == 1 else 8)
    kinds = {path.name.split("-")[1:][0] for path in files}
    assert kinds == {"EpochDataset"} | ({"WholeBlendedDataset"} if len(data) > 1 else set())
    sizes = {path: path.stat().st_size for path in files}
    for number, path in enumerate(files):
        os.truncate(path, (0, 60, sizes[path] - 1)[number % 3])
    again = run("again", data=data, count=2)
    assert tokens(again) == expected
    assert again.output[0].count(" was damaged, and is rebuilt") == len(files)
    assert {path: path.stat().st_size for path in files} == sizes


def test_files_without_weights_that_do_not_last_are_refused(run, tmp_path):
    """Otherwise Megatron's loader would end in the middle of a step."""
    for name in ("text", "more"):
        ranks.write_documents(tmp_path / name, DOCUMENTS)
    flags = ["--train-iters", "1000", "--exit-interval", "1"]
    line = the_error(run("refused", *flags, data=("text", "more"), check=False))
    assert "the run takes 8000 texts and --data-path has " in line
    assert len(run("short", data=("text", "more")).losses) == 4


def test_evaluations_go_on_with_files_without_weights_that_do_not_last(run, tmp_path):
    """Evaluations take every text once before they repeat one."""
    for name in ("text", "more"):
        ranks.write_documents(tmp_path / name, DOCUMENTS)
    flags = ["--eval-interval", "2", "--split", "80,20,0"]
    few, many = (
        run(iters, *flags, "--eval-iters", iters, data=("text", "more")) for iters in ("2", "40")
    )
    assert len(many.scalars["mdm/validation NELBO"]) == len(few.scalars["mdm/validation NELBO"])
    assert "of them different" in "".join(many.output)


# -- a resume


@pytest.fixture
def saved(run, tmp_path):
    """Flags that resume a run on `text` after two iterations."""
    ranks.write_documents(tmp_path / "text", DOCUMENTS)
    save = ["--save", str(tmp_path / "save"), "--save-interval", "2"]
    run("first", *save, "--exit-interval", "2")
    return ["--load", str(tmp_path / "save")]


def test_a_resume_on_other_data_is_refused(saved, run, tmp_path):
    changed = [*DOCUMENTS[:-1], [d + 1 for d in DOCUMENTS[-1]]]  # only the last document differs
    ranks.write_documents(tmp_path / "text", changed)
    path = tmp_path / "text"
    line = the_error(run("refused", *saved, check=False))
    assert f"trained on other data: {path} holds something else than it did. Give the" in line
    allowed = run("allowed", *saved, "--mdm-allow-flag-change")
    assert f"resumes on other data: {path} holds something else than it did" in allowed.output[0]


def test_a_resume_on_the_same_data_elsewhere_goes_on(saved, run, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.move(tmp_path / f"text{suffix}", tmp_path / f"moved{suffix}")
    assert len(run("moved-run", *saved, data=("moved",)).losses) == 2


def test_a_resume_with_another_mixture_is_refused(saved, run, tmp_path):
    ranks.write_documents(tmp_path / "more", DOCUMENTS)
    line = the_error(run("more-run", *saved, data=("0.5", "text", "0.5", "more"), check=False))
    assert "trained on other data: there were 1 files and are 2" in line


@pytest.fixture
def recorded(tmp_path):
    """A function that gives the arguments of a run on files with these weights."""
    for name in ("text", "more"):
        ranks.write_documents(tmp_path / name, DOCUMENTS[:3])

    def record(weights, names=("text", "more")):
        args = Namespace(load="run", finetune=False, mdm_allow_flag_change=False)
        blend = [str(tmp_path / name) for name in names], weights
        args.mdm_data, args.mdm_tokenizer = identities(args, blend, None, None)
        return args

    return record


def test_weights_are_what_they_mean(recorded):
    args = recorded([3.0, 1.0])
    check_same_data(args, vars(recorded([0.75, 0.25])))
    check_same_data(recorded(None, ["text"]), vars(recorded([0.3], ["text"])))
    for other in ([1.0, 1.0], None):
        with pytest.raises(UserError, match="text is of another part or weight: all, weight 0.75"):
            check_same_data(args, vars(recorded(other)))


# -- the tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two sentencepiece models with equally many pieces, and text made with the first."""
    directory = tmp_path_factory.mktemp("tokenizers")
    for name, words in (("one", "some words to make pieces of"), ("two", "xylophone quartz jazz")):
        lines = "".join(f"{words} {i * 7919}\n" for i in range(400))
        (directory / f"{name}.txt").write_text(lines)
        train_tokenizer(
            [str(directory / f"{name}.txt")], str(directory / f"{name}.model"), vocab_size=300
        )
    preprocess(
        [str(directory / "one.txt")],
        str(directory / "text"),
        load_sentencepiece(str(directory / "one.model")),
        workers=1,
        progress=False,
    )
    return directory


def with_tokenizer(directory, name):
    model = ["--tokenizer-model", str(directory / f"{name}.model"), "--split", "100,0,0"]
    return [*"--tokenizer-type SentencePieceTokenizer".split(), *model]


NULL = ["--mdm-mask-token-id", "--vocab-size", "--null-tokenizer-eod-id"]


def test_data_of_another_tokenizer_are_refused(tokenizers, run, tmp_path):
    for name in ("text.bin", "text.idx", "text.json", "one.model"):
        shutil.copy(tokenizers / name, tmp_path)
    save = ["--save", str(tmp_path / "save"), "--save-interval", "4"]
    run("one", *with_tokenizer(tmp_path, "one"), *save, drop=NULL)
    line = the_error(run("two", *with_tokenizer(tokenizers, "two"), drop=NULL, check=False))
    assert f"{tmp_path / 'text'} was made with another tokenizer than this one: its ids" in line
    allowed = [*with_tokenizer(tokenizers, "two"), "--mdm-allow-flag-change"]
    assert len(run("allowed", *allowed, drop=NULL).losses) == 4
    # Without the record beside the data, the checkpoint still tells its tokenizer.
    (tmp_path / "text.json").unlink()
    resume = [*with_tokenizer(tokenizers, "two"), "--load", str(tmp_path / "save")]
    resume += ["--train-iters", "5"]
    line = the_error(run("resumed", *resume, drop=NULL, check=False))
    assert "was trained with another tokenizer: its ids below 300 stand for other tok" in line
    # Fits to the checkpoint, evaluations and reports check their data in the same way.
    shutil.copy(tokenizers / "text.json", tmp_path)
    record = json.loads((tmp_path / "text.json").read_text())
    record["tokenizer"]["vocabulary"] = "0" * 64
    (tmp_path / "text.json").write_text(json.dumps(record))
    tools = {
        "fit_ppots": ["--data-path", str(tmp_path / "text"), "--output", str(tmp_path / "f.json")],
        "evaluate": ["--data", str(tmp_path / "text")],
        "variance_report": ["--data", str(tmp_path / "text"), "--output", str(tmp_path / "v.json")],
    }
    for name, flags in tools.items():
        words = [f"tools/{name}.py", "--load", str(tmp_path / "save"), "--device", "cpu", *flags]
        tool = ranks.launch(tmp_path / name, 1, "--", *words, entry=entries.tool, check=False)
        assert "was made with another tokenizer than this one: its ids" in the_error(tool)
    # A different tokenizer with as many pieces, under the same name, would read and write other
    # texts. The run has kept its own tokenizer; runs of earlier versions have not.
    shutil.copy(tokenizers / "two.model", tmp_path / "one.model")
    words = ["tools/generate.py", "--load", str(tmp_path / "save"), "--device", "cpu"]
    words += ["--prompt", "some", "--length", "2", "--no-stop-at-eos"]
    ranks.launch(tmp_path / "generate", 1, "--", *words, entry=entries.tool)
    assert (tmp_path / "generate" / "stdout0").read_text().startswith("some")
    kept = tmp_path / "save" / "tokenizer.model"
    assert kept.read_bytes() == (tokenizers / "one.model").read_bytes()
    kept.unlink()
    (tmp_path / "one.model").rename(tmp_path / "hidden.model")
    tool = ranks.launch(tmp_path / "generate", 1, "--", *words, entry=entries.tool, check=False)
    assert f"or put it beside the checkpoints, as {kept}" in the_error(tool)
    (tmp_path / "hidden.model").rename(tmp_path / "one.model")
    tool = ranks.launch(tmp_path / "generate", 1, "--", *words, entry=entries.tool, check=False)
    line = the_error(tool)
    assert f"{tmp_path}/one.model is not the one that the checkpoint was trained with: its" in line


# -- pairs


def test_pairs_are_not_torn_apart(run, tmp_path, base):
    ranks.write_pairs(tmp_path / "text", ranks.random_pairs(60))
    message = f"{tmp_path / 'text'} holds pairs of prompts and responses: add --mdm-sft to train"
    assert message in the_error(run("plain", check=False))
    fit = ["--data-path", str(tmp_path / "text"), "--output", str(tmp_path / "f.json")]
    words = ["tools/fit_ppots.py", "--load", base[base.index("--load") + 1], "--device", "cpu"]
    tool = ranks.launch(tmp_path / "fit", 1, "--", *words, *fit, entry=entries.tool, check=False)
    assert message in the_error(tool)
