"""Prompts and responses from JSONL: documents of two sequences, and one line about bad ones."""

import json

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_mdm.data.pairs import PairKeys
from megatron_mdm.data.preprocess import load_hugging_face, preprocess
from megatron_mdm.errors import UserError

WORDS = ["<eos>", "<user>", "<bot>", "a", "b", "c", "d", "[UNK]"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}"
    "{{ ' <eos> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Hugging Face tokenizer of words, with a chat template."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<eos>",
        unk_token="[UNK]",
        additional_special_tokens=["<user>", "<bot>"],
    )
    tokenizer.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return str(path)


def run(tmp_path, directory, lines, keys, **options):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prefix = str(tmp_path / "out")
    inputs = [str(tmp_path / "x.jsonl")]
    tokenizer = load_hugging_face(directory)
    summary = preprocess(
        inputs, prefix, tokenizer, pairs=keys, workers=1, progress=False, **options
    )
    dataset = IndexedDataset(prefix)
    words = [" ".join(WORDS[i] for i in dataset[n]) for n in range(len(dataset))]
    assert np.array_equal(dataset.document_indices, 2 * np.arange(len(words) // 2 + 1))
    return list(zip(words[::2], words[1::2], strict=True)), summary


def test_prompts_and_responses_are_two_sequences_of_a_document(tmp_path, directory):
    lines = [
        {"q": "a b", "response": "c"},
        {"q": "", "response": "d d"},
        {"q": "a", "response": ""},
    ]
    pairs, summary = run(tmp_path, directory, lines, PairKeys(prompt="q"))
    assert pairs == [("a b", "c <eos>"), ("", "d d <eos>")]
    assert (summary.documents, summary.empty_documents) == (2, 1)


def test_a_chat_template_splits_before_the_last_answer(tmp_path, directory):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d d"},
    ]
    keys = PairKeys(messages="m", template=directory)
    pairs, _ = run(tmp_path, directory, [{"m": messages}], keys)
    # The template's special tokens are tokens, and its last one ends the document already.
    assert pairs == [("<user> a <eos> <bot> b <eos> <user> c <eos> <bot>", "d d <eos>")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a"}, 'x.jsonl:1: no key "response" (see --response-key)'),
        ({"prompt": 3, "response": "a"}, 'the value of "prompt" is a JSON number'),
        ([], "a JSON array where an object is needed"),
    ],
)
def test_bad_pairs_are_named(tmp_path, directory, line, message):
    with pytest.raises(UserError) as caught:
        run(tmp_path, directory, [line], PairKeys())
    assert message in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", 'no list of messages under "m"'),
        ([{"role": "user"}], "without role and content"),
        ([{"role": "user", "content": "a"}], "is not the assistant's"),
    ],
)
def test_bad_conversations_are_named(tmp_path, directory, messages, message):
    keys = PairKeys(messages="m", template=directory)
    with pytest.raises(UserError) as caught:
        run(tmp_path, directory, [{"m": messages}], keys)
    assert message in str(caught.value)
