"""Prompts and responses from JSONL: documents of two sequences, and one line about bad ones."""

import datetime
import json

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_mdm.data.chat import ChatTemplate
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
SKIP = {"skip_bad_lines": True}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def answer(content, **more):
    """CHAT with this answer."""
    return [CHAT[0], {"role": "assistant", "content": content, **more}]


def encoded(path, chat_template):
    """What a worker makes of CHAT."""
    directory = tokenizer_directory(path, chat_template)
    keys = PairKeys(messages="m", template=directory)
    document = Document("x.jsonl", 1, json.dumps({"m": CHAT}).encode(), 0)
    return PairEncoder(load_hugging_face(directory), keys, append_eod=True)([document])


def rendered(path, chat_template, row, *ignored):
    """Prompt and response of a row, and why it is refused, one of the two."""
    directory = tokenizer_directory(path, chat_template)
    try:
        pair = ChatTemplate(directory, "m", ignored).pair(
            Document("x.jsonl", 7, json.dumps(row).encode(), 0)
        )
    except UserError as error:
        return None, str(error)
    return pair, None


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
        ([{"content": "a"}], 'message 1 of "m" has no role'),
        ([{"role": 1, "content": "a"}], 'message 1 of "m" has no role'),
        (["a"], 'message 1 of "m" has no role'),
        ([{"role": "user", "content": "a"}], "is not the assistant's"),
        (answer({"a": 1}), 'the content of message 2 of "m" is a JSON object'),
        (answer(3), 'the content of message 2 of "m" is a JSON number'),
        (answer([]), 'the content of message 2 of "m" is a JSON array'),
        (answer(["b"]), "a JSON array that is no text: give a string, or a list of {"),
        (answer([{"type": "image", "text": "b"}]), "a JSON array that is no text"),
        (answer([{"type": "text", "text": "b", "cache": 1}]), "a JSON array that is no text"),
        (answer([{"type": "text", "text": None}]), "a JSON array that is no text"),
        (answer(None), 'message 2 of "m" has no content, and no other key that the chat'),
        (answer(None, name="d"), 'message 2 of "m" has no content, and no other key that the'),
        ([{"role": "user"}, CHAT[1]], 'message 1 of "m" has no content'),
        (answer("b", weight=0), 'renders the same without the key "weight" of messages: --ignore'),
        (answer("b \ud83d"), r"the text holds a lone surrogate (\ud83d)"),
        (answer("b", **{"name": "\ud83d"}), r"the text holds a lone surrogate (\ud83d)"),
    ],
)
def test_bad_conversations_are_named(tmp_path, directory, messages, message):
    keys = PairKeys(messages="m", template=directory)
    with pytest.raises(UserError) as caught:
        run(tmp_path, directory, [{"m": messages}], keys)
    assert message in str(caught.value)
    pairs, summary = run(tmp_path, directory, [{"m": messages}, {"m": CHAT}], keys, **SKIP)
    assert pairs == [("<user> a <eos> <bot>", "b <eos>")] and summary.bad_documents == 1
    assert "x.jsonl:1: " in summary.bad_examples[0] and message in summary.bad_examples[0]


def test_parts_of_text_are_joined(tmp_path, directory):
    parts = [{"type": "text", "text": "b "}, {"type": "text", "text": "c", "image_url": None}]
    keys = PairKeys(messages="m", template=directory, ignored=("cache",))
    pairs, _ = run(tmp_path, directory, [{"m": answer(parts)}], keys)
    assert pairs == [("<user> a <eos> <bot>", "b c <eos>")]
    pairs, _ = run(tmp_path, directory, [{"m": answer([{**parts[1], "cache": 1}])}], keys)
    assert pairs == [("<user> a <eos> <bot>", "c <eos>")]


# What a row holds beside role and content of its messages.
TOOLS = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}"
USES = f"{TOOLS}{{% for d in documents or [] %}}({{{{ d.text }}}}){{% endfor %}}{{{{ mood }}}}"
CALLS = "{% for c in m.tool_calls or [] %}<{{ c.name }}>{% endfor %}"


def calling(content):
    """A template that writes `content` of each message, and its tool calls."""
    return f"{USES}{{% for m in messages %}}{{{{ {content} }}}}{CALLS};{{% endfor %}}"


def test_keys_of_a_row_reach_the_template_or_are_refused(tmp_path):
    row = {"m": CHAT, "tools": [{"name": "t"}], "documents": [{"text": "d"}], "mood": "!"}
    none = {"id": None, "tools": [], "x": "", "y": {}}  # which says nothing
    pair = ("[t](d)!a;", "b;")
    assert rendered(tmp_path, calling("m.content"), row) == (pair, None)
    assert rendered(tmp_path, calling("m.content"), {"m": CHAT, **none}) == (("a;", "b;"), None)
    # The two last ones are apply_chat_template's own, and no row's.
    row |= {"id": 1, "chat_template": "{{ 1 }}", "tokenize": True}
    _, message = rendered(tmp_path, calling("m.content"), row)
    assert message == (
        'x.jsonl:7: the chat template renders the same without the key "id", the key '
        '"chat_template", the key "tokenize": --ignore-keys leaves out the keys that it names'
    )
    _, message = rendered(tmp_path, template("<eos> ", ASKED), {"m": CHAT, "tools": row["tools"]})
    assert 'the same without the key "tools"' in message
    ignored = ("id", "chat_template", "tokenize", "mood")
    pair = ("[t](d)a;", "b;")
    assert rendered(tmp_path, calling("m.content"), row, *ignored) == (pair, None)


@pytest.mark.parametrize(
    "content",
    [
        "m.content",  # which would write None, in older versions of transformers
        "m.content + ''",  # which cannot be added
        "m['content'] if m.content is string else ''",
        "'' if m.content is none else m.content",
    ],
)
def test_an_answer_may_be_a_tool_call_alone(tmp_path, content):
    messages = answer(None, tool_calls=[{"name": "f"}], refusal=None)
    row = {"m": messages, "tools": [{"name": "t"}]}
    assert rendered(tmp_path, calling(content), row) == (("[t]a;", "<f>;"), None)
    del messages[1]["content"]
    assert rendered(tmp_path, calling(content), row) == (("[t]a;", "<f>;"), None)
    # Another message's calls do not stand in for it.
    _, message = rendered(
        tmp_path, calling(content), {"m": [*messages, CHAT[0], *answer(None)[1:]]}
    )
    assert 'message 4 of "m" has no content' in message


def test_null_is_left_to_a_template_that_looks_for_it(tmp_path, monkeypatch):
    """As older versions of transformers hand it on."""

    def apply(self, messages, add_generation_prompt=False, **_):
        calls = [
            m.get("tool_calls", "") if m["content"] is None else m["content"] for m in messages
        ]
        return ";".join(map(str, calls))

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", apply)
    row = {"m": answer(None, tool_calls="f")}
    assert rendered(tmp_path, template("<eos> ", ASKED), row) == (("a", ";f"), None)


def test_values_that_are_the_template_s_own_are_no_idle_ones(tmp_path):
    """Qwen2's template writes a system prompt by itself, and so renders the same without it."""
    system = (
        "{% if messages[0].role != 'system' %}be kind;{% endif %}{{ mood or '!' }}"
        "{% if think %}+{% else %}-{% endif %}"
    )
    plain = "{% for m in messages %}{{ m.content }}{{ m.name or 'x' }};{% endfor %}"
    rows = (
        {"m": [{"role": "system", "content": "be kind"}, *CHAT]},
        {"m": CHAT, "mood": "!"},
        {"m": CHAT, "think": False},
    )
    for row in rows:
        text = f"{system.replace('kind;', 'kindx;')}{plain}"
        pair, message = rendered(tmp_path, text, row)
        assert message is None and pair[1] == "bx;"
    pair, message = rendered(tmp_path, plain, {"m": answer("b", name="x")})
    assert message is None and pair == ("ax;", "bx;")


def test_messages_that_a_template_leaves_out_are_refused(tmp_path):
    row = {"m": [{"role": "system", "content": "c"}, *CHAT]}
    speakers = "{% for m in messages %}{{ m.content if m.role != 'system' }};{% endfor %}"
    assert rendered(tmp_path, speakers.replace(";", ""), row)[1] == (
        'x.jsonl:7: the chat template renders the same without the messages of the role "system": '
        "take these messages out of the file"
    )
    row["m"][0]["content"] = ""
    assert rendered(tmp_path, speakers.replace(";", ""), row) == (("a", "b"), None)


ASKING = """{% if date_string is not defined %}
{% set date_string = strftime_now("%d %b %Y") %}
{% endif %}"""


@pytest.mark.parametrize("date", [None, datetime.date(2000, 1, 2)])
@pytest.mark.parametrize(
    ("before", "written"),
    [
        # The spaces before a block, and the end of a line after one, are not written.
        ("\n  {% if 1 %}{{ strftime_now('%Y-%m-%d') }}{% endif %}\n\n", "\n{:%Y-%m-%d}\n"),
        ("  {% if 1 %}{{ strftime_now('%A\\n') }}{% endif %}", "{:%A}\n"),
        (ASKING + "{{ date_string }}: ", "{:%d %b %Y}: "),
        (ASKING, ""),
        ("", ""),
    ],
)
def test_a_template_writes_the_same_date_on_every_day(tmp_path, before, written, date):
    chat_template = before + template("<eos> ", ASKED)
    directory = tokenizer_directory(tmp_path, chat_template)
    keys = PairKeys(messages="m", template=directory, **({"date": date} if date else {}))
    date = date or datetime.date(2024, 7, 26)
    chat = ChatTemplate(directory, "m", date=keys.date)
    document = Document("x.jsonl", 1, json.dumps({"m": CHAT}).encode(), 0)
    pair = (written.format(date) + "<user> a <eos> <bot> ", "b <eos>")
    assert chat.pair(document) == pair
    _, summary = run(tmp_path, directory, [{"m": CHAT}], keys)
    assert summary.template_date == (date.isoformat() if written else None)
    said = f"wrote {date} for today's date (--template-date)"
    assert (said in str(summary)) == bool(written)
    if before.startswith(ASKING) and written:  # a row may have a date of its own
        row = json.dumps({"m": CHAT, "date_string": "then"}).encode()
        assert chat.pair(Document("x", 1, row, 0))[0].startswith("then: ")


def test_a_date_in_a_format_that_is_not_known_is_refused(tmp_path):
    chat_template = "{{ strftime_now('%' ~ 'd') }}" + template("<eos> ", ASKED)
    _, message = rendered(tmp_path, chat_template, {"m": CHAT})
    assert "refuses it: strftime_now(%d): write the format out there" in message


def test_reasoning_may_be_left_out_of_earlier_answers(tmp_path):
    last = "{% for m in messages %}{{ m.role[0] }} {{ m.why if loop.last }}{{ m.content }} "
    last += "{% endfor %}{% if add_generation_prompt %}a {% endif %}"
    messages = [CHAT[0], {**CHAT[1], "why": "x"}, CHAT[0], {**CHAT[1], "why": "y"}]
    assert rendered(tmp_path, last, {"m": messages}) == (("u a a b u a a ", "yb "), None)
    del messages[3]["why"]
    assert 'without the key "why" of messages' in rendered(tmp_path, last, {"m": messages})[1]


def test_a_pair_that_spells_the_mask_token_is_refused(tmp_path):
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="[UNK]", mask_token="<mask>"
    )
    fast.chat_template = template("<eos> ", ASKED)
    fast.save_pretrained(tmp_path / "hf")
    tokenizer = load_hugging_face(str(tmp_path / "hf"))
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"m": answer("b <mask>"), "prompt": "a", "response": "b <mask>"})
    )
    arguments = [str(tmp_path / "x.jsonl")], str(tmp_path / "out"), tokenizer
    ignored = ("prompt", "response")
    keys = PairKeys(messages="m", template=str(tmp_path / "hf"), ignored=ignored)
    with pytest.raises(UserError, match=r"x.jsonl:1: the text spells .* mask token \(id 10\)"):
        preprocess(*arguments, pairs=keys, workers=1, progress=False)
    assert not list(tmp_path.glob("out*"))
    # Elsewhere it is ordinary text.
    preprocess(*arguments, pairs=PairKeys(), workers=1, progress=False)
    dataset = IndexedDataset(str(tmp_path / "out"))  # which the arrays need as long as they live
    assert 10 not in dataset[1]
