"""Prompts and responses from JSONL: documents of two sequences, and one line about bad ones."""

import json

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_mdm.data.documents import Document
from megatron_mdm.data.pairs import PairEncoder, PairKeys
from megatron_mdm.data.preprocess import load_hugging_face, preprocess
from megatron_mdm.errors import UserError

WORDS = ["<eos>", "<user>", "<bot>", "a", "b", "c", "d", "[UNK]", "<eot>", "\n"]


def template(end, tail, before=""):
    """A chat template: what ends a message, and what follows the last one."""
    return (
        f"{before}{{% for m in messages %}}{{{{ '<user> ' if m.role == 'user' else '<bot> ' }}}}"
        f"{{{{ m.content + ' {end}' }}}}{{% endfor %}}{tail}"
    )


# What follows the last message when it is asked for, and always.
ASKED = "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
ALWAYS = "{{ '<bot> ' }}"
# Before the messages: a look at the first one, and a stand-in for none.
FIRST = "{% if messages[0].role == 'system' %}{{ '<user> ' }}{% endif %}"
DEFAULT = "{% if not messages %}{{ '<user> a <eot> ' }}{% endif %}"
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def encoded(path, chat_template):
    """What a worker makes of CHAT."""
    directory = tokenizer_directory(path, chat_template)
    keys = PairKeys(messages="m", template=directory)
    document = Document("x.jsonl", 1, json.dumps({"m": CHAT}).encode(), 0)
    return PairEncoder(load_hugging_face(directory), keys, append_eod=True)([document])


def tokenizer_directory(path, chat_template):
    """A Hugging Face tokenizer of words, with a chat template."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<eos>",
        unk_token="[UNK]",
        additional_special_tokens=["<user>", "<bot>", "<eot>", "\n"],
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tokenizer_directory(tmp_path_factory.mktemp("tokenizer"), template("<eos> ", ASKED))


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
    ("chat_template", "prompt", "response"),
    [
        # Qwen's shape: the end of a message, and of a document, and then a new line.
        (template("<eos>\n", ASKED), "<user> a <eos> \n <bot>", "b <eos>"),
        # Another end than the document's, which follows it.
        (template("<eot>\n", ASKED), "<user> a <eot> \n <bot>", "b <eot> \n <eos>"),
        # LLaDA's: the header of an answer after every conversation, whether it is asked for or not.
        (template("<eot> ", ALWAYS), "<user> a <eot> <bot>", "b <eot> <eos>"),
        # No header for an answer to come.
        (template("<eos> ", ""), "<user> a <eos>", "<bot> b <eos>"),
        (template("<eos> ", "", FIRST), "<user> a <eos>", "<bot> b <eos>"),
    ],
)
def test_a_response_ends_with_one_end(tmp_path, chat_template, prompt, response):
    chunk = encoded(tmp_path, chat_template)
    words = [WORDS[i] for i in chunk.tokens]
    ((length, _),) = chunk.lengths
    assert (" ".join(words[:length]), " ".join(words[length:])) == (prompt, response)


@pytest.mark.parametrize("before", [FIRST, DEFAULT])
def test_what_is_always_appended_is_found_or_refused(tmp_path, before):
    (message,) = encoded(tmp_path, template("<eot> ", ALWAYS, before)).bad
    assert message.startswith("x.jsonl:1: the chat template ignores add_generation_prompt")
    assert "give prompt and response as texts" in message and "\n" not in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a"}, 'x.jsonl:1: no key "response" (see --response-key)'),
        ({"prompt": 3, "response": "a"}, 'the value of "prompt" is a JSON number'),
        ([], "x.jsonl holds a JSON array"),
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
