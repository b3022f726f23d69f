"""Texts, their tokens computed in the plainest way, and functions that preprocess and read them."""

import json
import os
import pathlib
import runpy
import sys
import sysconfig
import time

import psutil
import sentencepiece

from megatron_mdm.data.load_tokenizer import load_hugging_face
from megatron_mdm.data.preprocess import preprocess
from megatron_mdm.data.tokenizer import train_tokenizer
from tests import ROOT

TOOL = ROOT / "tools" / "preprocess_data.py"
SOURCE = (pathlib.Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
# Texts of very different lengths, so that workers do not keep in step.
TEXTS = [SOURCE[i * i : i * i + 7 * (i % 13) ** 3 + 1] for i in range(200)]


def train_on_source(directory):
    """Trains a tokenizer of 500 pieces in `directory`, and returns its path."""
    (directory / "a.py").write_text(SOURCE)
    train_tokenizer([str(directory / "a.py")], str(directory / "t.model"), vocab_size=500)
    return directory / "t.model"


def plain_tokens(model):
    """A function from texts to their tokens, computed in the plainest way."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return lambda texts: [[*processor.encode(text), processor.eos_id()] for text in texts]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def run(inputs, prefix, tokenizer, **options):
    options = {"workers": 1, "progress": False} | options
    return preprocess(inputs, str(prefix), tokenizer, **options)


def read(prefix):
    """Reads the documents, and checks that each is one sequence."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def run_tool_here(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


def save_hugging_face(directory, words, **options):
    """Saves a word-level tokenizer. Its special tokens have the last two ids, eos the very last.

    Its file asks for truncation to two tokens, which must have no effect.
    """
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<mask>", "</s>"])
    backend.enable_truncation(2)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", mask_token="<mask>", **options
    )
    fast.save_pretrained(directory)
    return load_hugging_face(str(directory))


WORDS = ["<unk>", "a", "b", "c"]


def wait_for_the_end_of_group(group):
    deadline = time.monotonic() + 30
    while any(p.status() != psutil.STATUS_ZOMBIE for p in members(group)):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)


def members(group):
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group:
                yield process
        except ProcessLookupError:
            pass
