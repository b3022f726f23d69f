"""Prompts and responses from JSONL become documents of two sequences; bad ones give one line."""

import dataclasses
import datetime
import json
import random
import traceback

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from megatron_mdm.data.chat import ChatTemplate
from megatron_mdm.data.documents import Document
from megatron_mdm.data.encoding import open_hugging_face
from megatron_mdm.data.identity import data_identity
from megatron_mdm.data.load_tokenizer import load_hugging_face
from megatron_mdm.data.pairs import PairEncoder, PairKeys
from megatron_mdm.data.preprocess import preprocess
from megatron_mdm.errors import UserError

WORDS = ["<eos>", "<user>", "<bot>", "a", "b", "c", "d", "[UNK]", "<eot>", "\n"]


def template(end, tail, before=""):
    """A chat template with `end` after each message and `tail` after the last one."""
    return (
        f"{before}{{% for m in messages %}}{{{{ '<user> ' if m.role == 'user' else '<bot> ' }}}}"
        f"{{{{ m.content + ' {end}' }}}}{{% endfor %}}{tail}"
    )


# The header of an answer after the last message: if it is asked for, and always.
ASKED = "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
ALWAYS = "{{ '<bot> ' }}"
# Text before the messages: it depends on the first message, or stands in for no messages.
FIRST = "{% if messages[0].role == 'system' %}{{ '<user> ' }}{% endif %}"
DEFAULT = "{% if not messages %}{{ '<user> a <eot> ' }}{% endif %}"
SKIP = {"skip_bad_lines": True}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def answer(content, **more):
    """CHAT with this answer."""
    return [CHAT[0], {"role": "assistant", "content": content, **more}]


def encoded(path, chat_template):
    """The chunk that a worker makes of CHAT."""
    directory = tokenizer_directory(path, chat_template)
    keys = PairKeys(messages="m", template=directory)
    document = Document("x.jsonl", 1, json.dumps({"m": CHAT}).encode(), 0)
    return PairEncoder(load_hugging_face(directory), keys, append_eod=True)([document])


def rendered(path, chat_template, row, *ignored):
    """(prompt, response) of a row and None, or None and the reason why the row is refused."""
    directory = tokenizer_directory(path, chat_template)
    document = Document("x.jsonl", 7, json.dumps(row).encode(), 0)
    try:
        (pair,) = chat(directory, ignored).pairs(document)
    except UserError as error:
        return None, str(error)
    assert not pair.has_marks
    return pair[:2], None


def chat(directory, ignored=(), **options):
    special = load_hugging_face(directory).special_tokens()
    return ChatTemplate(open_hugging_face(directory), "m", special, ignored, **options)


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


@pytest.mark.slow
def test_a_chat_template_splits_before_the_last_answer(tmp_path, directory):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d d"},
    ]
    keys = PairKeys(messages="m", template=directory)
    pairs, _ = run(tmp_path, directory, [{"m": messages}], keys)
    # Special tokens of the template are encoded as such, and its last one ends the document
    # already.
    assert pairs == [("<user> a <eos> <bot> b <eos> <user> c <eos> <bot>", "d d <eos>")]


@pytest.mark.parametrize(
    ("chat_template", "prompt", "response"),
    [
        # Qwen's shape: a message ends with the end of document and a newline.
        (template("<eos>\n", ASKED), "<user> a <eos> \n <bot>", "b <eos>"),
        # A message ends with another token, so the end of document follows it.
        (template("<eot>\n", ASKED), "<user> a <eot> \n <bot>", "b <eot> \n <eos>"),
        # LLaDA's shape: an answer's header follows every conversation, asked for or not.
        (template("<eot> ", ALWAYS), "<user> a <eot> <bot>", "b <eot> <eos>"),
        # No header for an answer that is asked for.
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


@pytest.mark.slow
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
        (answer(["b"]), "a JSON array that is not text: give a string, or a list of {"),
        (answer([{"type": "image", "text": "b"}]), "a JSON array that is not text"),
        (answer([{"type": "text", "text": "b", "cache": 1}]), "a JSON array that is not text"),
        (answer([{"type": "text", "text": None}]), "a JSON array that is not text"),
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


@pytest.mark.slow
def test_parts_of_text_are_joined(tmp_path, directory):
    parts = [{"type": "text", "text": "b "}, {"type": "text", "text": "c", "image_url": None}]
    keys = PairKeys(messages="m", template=directory, ignored=("cache",))
    pairs, _ = run(tmp_path, directory, [{"m": answer(parts)}], keys)
    assert pairs == [("<user> a <eos> <bot>", "b c <eos>")]
    pairs, _ = run(tmp_path, directory, [{"m": answer([{**parts[1], "cache": 1}])}], keys)
    assert pairs == [("<user> a <eos> <bot>", "c <eos>")]


# Keys of a row beside the role and content of its messages.
TOOLS = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}"
USES = f"{TOOLS}{{% for d in documents or [] %}}({{{{ d.text }}}}){{% endfor %}}{{{{ mood }}}}"
CALLS = "{% for c in m.tool_calls or [] %}<{{ c.name }}>{% endfor %}"


def calling(content):
    """A template that writes the expression `content` for each message, and its tool calls."""
    return f"{USES}{{% for m in messages %}}{{{{ {content} }}}}{CALLS};{{% endfor %}}"


def test_keys_of_a_row_reach_the_template_or_are_refused(tmp_path):
    row = {"m": CHAT, "tools": [{"name": "t"}], "documents": [{"text": "d"}], "mood": "!"}
    none = {"id": None, "tools": [], "x": "", "y": {}}  # empty values say nothing
    pair = ("[t](d)!a;", "b;")
    assert rendered(tmp_path, calling("m.content"), row) == (pair, None)
    assert rendered(tmp_path, calling("m.content"), {"m": CHAT, **none}) == (("a;", "b;"), None)
    # The last two keys are parameters of apply_chat_template, not keys of a row.
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


def test_a_key_may_be_for_the_header_of_an_answer_alone(tmp_path):
    """Qwen3's enable_thinking, which is written into the prompt, is such a key."""
    thinks = "{% if add_generation_prompt and mood %}{{ '<bot> ' + mood }}{% endif %}"
    directory = tokenizer_directory(tmp_path, template("<eos> ", thinks))
    row = {"m": CHAT[:1], "mood": "c "}
    prompt, _ = chat(directory).prompt(Document("x", 1, json.dumps(row).encode(), 0))
    assert prompt == "<user> a <eos> <bot> c "
    row = {"m": [CHAT[0], {"role": "assistant", "content": "c b"}], "mood": "c "}
    pair = ("<user> a <eos> <bot> c ", "b <eos>")
    assert rendered(tmp_path, template("<eos> ", thinks), row) == (pair, None)
    with pytest.raises(UserError, match='without the key "id"'):
        chat(directory).prompt(
            Document("x", 1, json.dumps({**row, "m": CHAT[:1], "id": 1}).encode(), 0)
        )


@pytest.mark.parametrize(
    "content",
    [
        "m.content",  # it would write None, in older versions of transformers
        "m.content + ''",  # None cannot be added
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
    # Tool calls of another message do not replace a missing content.
    _, message = rendered(
        tmp_path, calling(content), {"m": [*messages, CHAT[0], *answer(None)[1:]]}
    )
    assert 'message 4 of "m" has no content' in message


def test_null_is_left_to_a_template_that_looks_for_it(tmp_path, monkeypatch):
    """Older versions of transformers pass null on to the template."""

    def apply(self, messages, add_generation_prompt=False, **_):
        calls = [
            m.get("tool_calls", "") if m["content"] is None else m["content"] for m in messages
        ]
        return ";".join(map(str, calls))

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", apply)
    row = {"m": answer(None, tool_calls="f")}
    assert rendered(tmp_path, template("<eos> ", ASKED), row) == (("a", ";f"), None)


def test_values_that_are_the_template_s_own_are_no_idle_ones(tmp_path):
    """Qwen2's template writes a system prompt by itself, so it renders the same without it."""
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


@pytest.mark.slow
@pytest.mark.parametrize("date", [None, datetime.date(2000, 1, 2)])
@pytest.mark.parametrize(
    ("before", "written"),
    [
        # Jinja does not write spaces before a block and the newline after one.
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
    dated = chat(directory, date=keys.date)
    document = Document("x.jsonl", 1, json.dumps({"m": CHAT}).encode(), 0)
    pair = (written.format(date) + "<user> a <eos> <bot> ", "b <eos>")
    assert [p[:2] for p in dated.pairs(document)] == [pair]
    _, summary = run(tmp_path, directory, [{"m": CHAT}], keys)
    assert summary.template_date == (date.isoformat() if written else None)
    said = f"wrote {date} for today's date (--template-date)"
    assert (said in str(summary)) == bool(written)
    if before.startswith(ASKING) and written:  # a row may have its own date
        row = json.dumps({"m": CHAT, "date_string": "then"}).encode()
        assert dated.pairs(Document("x", 1, row, 0))[0].prompt.startswith("then: ")


def test_a_date_in_a_format_that_is_not_known_is_refused(tmp_path):
    chat_template = "{{ strftime_now('%' ~ 'd') }}" + template("<eos> ", ASKED)
    _, message = rendered(tmp_path, chat_template, {"m": CHAT})
    assert "refuses it: strftime_now(%d): write the format out there" in message


# -- every turn

SEVERAL = [
    {"role": "system", "content": "c"},
    {"role": "assistant", "content": "d"},
    *CHAT,
    {"role": "user", "content": "c c"},
    {"role": "assistant", "content": "d d"},
]


def test_every_answer_is_a_pair_with_all_that_comes_before_it(tmp_path, directory):
    """A greeting answers nothing and gives no pair. The last pair is that of --turns last."""
    lines = [{"m": SEVERAL}, {"m": CHAT}, {"m": SEVERAL[:2]}]
    every, summary = run(
        tmp_path, directory, lines, PairKeys(messages="m", template=directory, turns="every")
    )
    last, _ = run(tmp_path, directory, lines, PairKeys(messages="m", template=directory))
    first = "<bot> c <eos> <bot> d <eos> <user> a <eos> <bot>"
    assert every == [
        (first, "b <eos>"),
        (f"{first} b <eos> <user> c c <eos> <bot>", "d d <eos>"),
        ("<user> a <eos> <bot>", "b <eos>"),
        ("<bot> c <eos> <bot>", "d <eos>"),
    ]
    assert last == every[1:]
    assert (summary.documents, summary.tokens) == (4, sum(len(" ".join(p).split()) for p in every))


def test_a_turn_is_rendered_as_if_the_conversation_ended_there(tmp_path):
    """The template drops the reasoning of earlier answers, so each answer is learnt with its own.

    --turns last refuses a key that only earlier answers have.
    """
    text = "{% for m in messages %}{{ m.role[0] }} {{ m.why if loop.last }}{{ m.content }} "
    text += "{% endfor %}{% if add_generation_prompt %}a {% endif %}"
    row = {"m": [CHAT[0], {**CHAT[1], "why": "x"}, *CHAT], "n": None}
    directory = tokenizer_directory(tmp_path, text)
    every = chat(directory, turns="every")
    pairs = every.pairs(document_of(row))
    assert [pair[:2] for pair in pairs] == [("u a a ", "xb "), ("u a a b u a a ", "b ")]
    assert 'without the key "why" of messages' in rendered(tmp_path, text, row)[1]
    row["m"][0] = {**CHAT[0], "why": ""}
    row["m"][1]["who"] = "y"
    with pytest.raises(UserError, match='x.jsonl:1: .* without the key "who" of messages: --ign'):
        every.pairs(document_of(row))


@pytest.mark.parametrize("turns", ["last", "every"])
def test_a_turn_whose_prompt_does_not_begin_it_is_named(tmp_path, turns):
    """The template opens a first answer with text that the rendered answer does not have."""
    text = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"
    text += "{% if add_generation_prompt %}a {{ '<think>' if messages|length < 2 }}{% endif %}"
    pairs = chat(tokenizer_directory(tmp_path, text), turns=turns).pairs
    document = document_of({"m": [*CHAT, *CHAT]}, 7)
    if turns == "last":
        assert [pair[:2] for pair in pairs(document)] == [("u a a b u a a ", "b ")]
        return
    with pytest.raises(UserError) as caught:
        pairs(document)
    assert str(caught.value) == (
        "x.jsonl:7: the chat template renders the conversation differently without message 2, an "
        "answer: give prompt and response as texts instead, or take --turns last"
    )


def test_special_tokens_that_any_turn_spells_are_text(tmp_path):
    directory, fast = chat_directory(tmp_path, byte_pairs())
    keys = PairKeys(messages="m", template=directory, turns="every")
    row = {"m": [*answer("<|im_end|>"), *answer("b")]}
    chunk = PairEncoder(load_hugging_face(directory), keys, append_eod=True)([document_of(row)])
    assert chunk.bad == [] and chunk.spelling == 1 and len(chunk.lengths) == 2
    ends = np.cumsum([sum(pair) for pair in chunk.lengths])
    first, second = np.split(chunk.tokens, ends[:-1])
    whole = fast.apply_chat_template(row["m"], tokenize=False)
    assert fast.decode(second.tolist()) == whole.removesuffix("\n")
    assert second[: len(first)].tolist() == first.tolist()
    end = fast.convert_tokens_to_ids("<|im_end|>")
    assert (first.tolist().count(end), second.tolist().count(end)) == (2, 4)


def test_data_of_the_last_turn_are_the_same_as_before(tmp_path, directory):
    """Their options have no new key, so such data are kept by --unless-done and recognised."""
    keys = PairKeys(messages="m", template=directory)
    assert keys.options().keys() == {
        "messages_key", "template", "special_tokens_in_rows", "ignore_keys", "template_date"
    }  # fmt: skip
    lines = [{"m": SEVERAL}]
    run(tmp_path, directory, lines, keys)
    every = dataclasses.replace(keys, turns="every")
    tokenizer = load_hugging_face(directory)
    inputs, prefix = [str(tmp_path / "x.jsonl")], str(tmp_path / "out")
    again = {"workers": 1, "progress": False, "unless_done": True}
    before = data_identity(prefix)
    assert preprocess(inputs, prefix, tokenizer, pairs=keys, **again) is None
    assert preprocess(inputs, prefix, tokenizer, pairs=every, **again) is not None
    assert json.loads((tmp_path / "out.json").read_text())["options"]["turns"] == "every"
    assert data_identity(prefix).full != before.full


def test_reasoning_may_be_left_out_of_earlier_answers(tmp_path):
    last = "{% for m in messages %}{{ m.role[0] }} {{ m.why if loop.last }}{{ m.content }} "
    last += "{% endfor %}{% if add_generation_prompt %}a {% endif %}"
    messages = [CHAT[0], {**CHAT[1], "why": "x"}, CHAT[0], {**CHAT[1], "why": "y"}]
    assert rendered(tmp_path, last, {"m": messages}) == (("u a a b u a a ", "yb "), None)
    del messages[3]["why"]
    assert 'without the key "why" of messages' in rendered(tmp_path, last, {"m": messages})[1]


@pytest.mark.slow
def test_a_mask_token_that_a_pair_spells_is_text(tmp_path):
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="[UNK]", mask_token="<mask>"
    )
    fast.chat_template = template("<eos> ", ASKED)
    fast.save_pretrained(tmp_path / "hf")
    row = {"m": answer("b <mask>"), "prompt": "a", "response": "b <mask>"}
    ignored = ("prompt", "response")
    keys = PairKeys(messages="m", template=str(tmp_path / "hf"), ignored=ignored)
    for pair in (keys, PairKeys()):
        pairs, summary = run(tmp_path, str(tmp_path / "hf"), [row], pair)
        assert pairs[0][1] == "b [UNK] <eos>"
        assert summary.spelling == (pair is keys)
    with pytest.raises(UserError, match=r"x.jsonl:1: the text spells .* mask token \(id 10\)"):
        run(tmp_path, str(tmp_path / "hf"), [row], PairKeys(), special_tokens=True)
    # A template that writes the mask token is refused too.
    fast.chat_template = template("<mask> ", ASKED)
    fast.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=r"x.jsonl:1: the text spells .* mask token \(id 10\)"):
        run(
            tmp_path,
            str(tmp_path / "hf"),
            [{"m": CHAT}],
            PairKeys(messages="m", template=keys.template),
        )


# -- special tokens that a row spells

CHATML = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|mask|>", ">>"]


def byte_pairs(normalizer=None, pre_tokenizer=None, **options):
    """A tokenizer of bytes with some merges, whose special tokens have these options."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.train_from_iterator(["<|im_end|> user assistant what is <|im_start|>?\n"] * 9, trainer)
    inner.decoder = decoders.ByteLevel()
    if normalizer:
        inner.normalizer = normalizer
    if pre_tokenizer:
        inner.pre_tokenizer = pre_tokenizer
    inner.add_special_tokens([AddedToken(token, **options) for token in SPECIAL])
    return inner


def pieces_of_unigram():
    """A tokenizer with special tokens among its pieces, which it therefore finds in text."""
    letters = [(c, -5.0) for c in map(chr, range(33, 127))] + [("\u2581", -2.0), ("\n", -3.0)]
    inner = Tokenizer(models.Unigram([("<unk>", 0.0), ("<|im_end|>", 0.0), *letters], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.add_special_tokens(SPECIAL)
    return inner


def chat_directory(path, inner, chat_template=CHATML):
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", mask_token="<|mask|>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(path)
    return str(path), fast


def encoder_of(directory):
    keys = PairKeys(messages="m", template=directory)
    return PairEncoder(load_hugging_face(directory), keys, append_eod=True)


def document_of(row, line=1):
    return Document("x.jsonl", line, json.dumps(row).encode(), 0)


def test_a_special_token_in_a_message_is_text(tmp_path):
    directory, fast = chat_directory(tmp_path, byte_pairs())
    question = "what is <|im_end|> and <|mask|>>> ?"
    row = {
        "m": [{"role": "user", "content": question}, {"role": "assistant", "content": "<|im_end|>"}]
    }
    row["tools"] = [{"<|mask|>": {"name": "ends with <|im_end|>"}}]
    chunk = encoder_of(directory)([document_of(row)])
    assert chunk.bad == [] and chunk.spelling == 1
    ids = chunk.tokens.tolist()
    rendered = fast.apply_chat_template(row["m"], tools=row["tools"], tokenize=False)
    text = rendered.removesuffix("\n")
    assert fast.decode(ids) == text and chunk.text_bytes == len(text.encode())
    start, end, mask, pair = map(fast.convert_tokens_to_ids, SPECIAL)
    assert (ids.count(start), ids.count(end), ids.count(mask), ids.count(pair)) == (2, 2, 0, 0)
    ((length, _),) = chunk.lengths
    plain = load_hugging_face(directory).load()
    assert ids[length:] == [*plain("<|im_end|>"), end]
    before, _, after = rendered.partition("<|im_start|>")
    after = after.partition("<|im_end|>\n<|im_start|>assistant")[0]
    user = f"user\n{question}"
    assert ids[:length] == [
        *plain(before), start, *plain(user), end, *plain("\n"), start, *plain("assistant\n")
    ]  # fmt: skip
    # Special tokens that another row spells do not affect this row.
    ordinary = {"m": CHAT}
    alone, both = (
        encoder_of(directory)([document_of(r) for r in rows])
        for rows in ([ordinary], [row, ordinary])
    )
    assert both.tokens.tolist() == ids + alone.tokens.tolist() and alone.spelling == 0
    whole = fast.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert [*alone.tokens.tolist(), *plain("\n")] == whole


def test_a_prompt_alone_has_the_tokens_that_it_has_before_an_answer(tmp_path):
    directory, _ = chat_directory(tmp_path, byte_pairs())
    encode = encoder_of(directory)
    for text in ("what?", "what is <|im_end|>?"):
        asked = [{"role": "user", "content": text}, CHAT[1], {"role": "user", "content": "c"}]
        chunk = encode([document_of({"m": [*asked, CHAT[1]], "tools": [{"name": "t"}]})])
        ((length, _),) = chunk.lengths
        prompt = encode.prompt(document_of({"m": asked, "tools": [{"name": "t"}]}))
        assert prompt == chunk.tokens[:length].tolist()
    for messages, message in (
        (CHAT, 'x.jsonl:1: the last message of "m" is the assistant\'s: leave it out'),
        ([{**CHAT[0], "who": "d"}], 'the same without the key "who" of messages'),
        ([{"role": "user", "content": None}], 'message 1 of "m" has no content'),
        ([], 'no list of messages under "m"'),
    ):
        with pytest.raises(UserError) as caught:
            encode.prompt(document_of({"m": messages}))
        assert message in str(caught.value)


KINDS = {
    "bytes": lambda: byte_pairs(),
    "strip": lambda: byte_pairs(lstrip=True, rstrip=True),
    "normalized": lambda: byte_pairs(normalizers.Lowercase(), normalized=True),
    "prepend": lambda: byte_pairs(normalizers.Prepend("_"), normalized=False),
    "first": lambda: byte_pairs(
        pre_tokenizer=pre_tokenizers.Metaspace(replacement="_", prepend_scheme="first")
    ),
    "pieces": pieces_of_unigram,
}
# The kinds that refuse some or all rows that spell special tokens.
REFUSING = {"normalized", "first", "pieces"}


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_the_template_s_or_the_row_is_refused(kind, tmp_path):
    """These tokenizers cut texts at special tokens in different ways."""
    directory, fast = chat_directory(tmp_path, KINDS[kind]())
    backend = fast.backend_tokenizer
    special = {fast.convert_tokens_to_ids(token) for token in SPECIAL}
    encode = encoder_of(directory)
    rng = random.Random(0)
    parts = [*SPECIAL, "<|", "im_end", "|>", ">", " ", "\n", "a", " b", "<|IM_END|>", "user"]
    refused = {True: 0, False: 0}
    for line in range(1, 201):
        texts = ["".join(rng.choices(parts, k=rng.randrange(1, 5))) for _ in range(3)]
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        messages.append({"role": "assistant", "content": "a"})
        chunk = encode([document_of({"m": messages}, line)])
        spelled = [
            t
            for t in texts
            if any(
                s in backend.normalizer.normalize_str(t) if kind == "normalized" else s in t
                for s in SPECIAL
            )
        ]
        if chunk.bad:
            assert chunk.bad[0].startswith(f"x.jsonl:{line}: ")
            refused[bool(spelled)] += 1
            continue
        ids = chunk.tokens.tolist()
        found = [i for i in ids if i in special]
        start, end = map(fast.convert_tokens_to_ids, SPECIAL[:2])
        assert found == [start, end] * 4
        if not spelled:
            ((length, _),) = chunk.lengths
            text = fast.apply_chat_template(messages, tokenize=False)
            cut = text.rindex("a<|im_end|>")
            backend.encode_special_tokens = False
            for part, own in ((text[:cut], ids[:length]), (text[cut:].rstrip(), ids[length:])):
                assert backend.encode(part, add_special_tokens=False).ids == own
    assert refused[False] == 0
    assert bool(refused[True]) == (kind in REFUSING)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (CHATML.replace("m.content", "m.content | upper"), None),
        (CHATML.replace("m.content", "m.content | trim"), None),
        (
            CHATML.replace("m.content", "m.content.split('<|mask|>')[-1]"),
            "looks for it, or changes",
        ),
        (CHATML.replace("m.content", "m.content | length"), "looks for it, or changes it"),
        (
            "{% if '<|mask|>' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
            + CHATML,
            "looks for it, or changes it",
        ),
    ],
)
def test_a_template_that_looks_for_special_tokens_in_messages(tmp_path, chat_template, message):
    directory, _ = chat_directory(tmp_path, byte_pairs(), chat_template)
    row = {"m": [{"role": "user", "content": " a<|mask|> "}, *answer("b")[1:]]}
    chunk = encoder_of(directory)([document_of(row), document_of({"m": CHAT}, 2)])
    if message is None:
        assert chunk.bad == []
    else:
        assert len(chunk.bad) == 1
        assert chunk.bad[0].startswith("x.jsonl:1: it spells a special token of the tokenizer, whi")
        assert message in chunk.bad[0]


@pytest.mark.parametrize(
    ("rendered", "message"),
    [
        ("m.content ~ m.more", {"content": "<|im_", "more": "start|>"}),
        ("m.content | lower", {"content": "<|IM_START|>"}),
        ("m.content | replace('*', '')", {"content": "<|im_*start|>"}),
    ],
)
def test_a_template_may_make_special_tokens_of_strings_that_spell_none(tmp_path, rendered, message):
    """Some templates do so on purpose, and cannot be told from the others."""
    chat_template = CHATML.replace("m.content", rendered)
    directory, fast = chat_directory(tmp_path, byte_pairs(), chat_template)
    messages = [{"role": "user", **message}, answer("b")[1]]
    chunk = encoder_of(directory)([document_of({"m": messages})])
    assert chunk.bad == [] and chunk.spelling == 0
    start = fast.convert_tokens_to_ids("<|im_start|>")
    assert chunk.tokens.tolist().count(start) == len(messages) + 1


def test_the_mark_itself_in_a_row(tmp_path):
    directory, fast = chat_directory(tmp_path, byte_pairs())
    chunk = encoder_of(directory)(
        [document_of({"m": answer(c)}) for c in ("\ufdd0", "\ufdd0<|mask|>")]
    )
    assert len(chunk.bad) == 1 and "spells a special token" in chunk.bad[0]
    assert fast.decode(chunk.tokens.tolist()).endswith("assistant\n\ufdd0<|im_end|>")


def test_texts_that_become_special_tokens_are_refused(tmp_path):
    directory, fast = chat_directory(tmp_path / "hf", pieces_of_unigram())
    end, mask = map(fast.convert_tokens_to_ids, ("<|im_end|>", "<|mask|>"))
    rows = [{"prompt": "a<|mask|>", "response": "b"}, {"prompt": "a<|im_end|>", "response": "b"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(tmp_path / "x.jsonl")], str(tmp_path / "out"), load_hugging_face(directory)
    options = {"workers": 1, "progress": False}
    for data in ({"pairs": PairKeys()}, {"json_key": "prompt"}):
        with pytest.raises(UserError) as caught:
            preprocess(*arguments, **data, **options)
        assert f"x.jsonl:2: the text spells a special token (id {end}), which this" in str(
            caught.value
        )
        summary = preprocess(*arguments, **data, **options, **SKIP)
        assert (summary.documents, summary.bad_documents) == (1, 1)
        dataset = IndexedDataset(str(tmp_path / "out"))  # the arrays need it
        tokens = np.concatenate(list(dataset))
        assert mask not in tokens and tokens.tolist().count(end) == 1
    with pytest.raises(UserError, match="x.jsonl:1: the text spells the tokenizer's mask token"):
        preprocess(*arguments, pairs=PairKeys(), special_tokens=True, **options)


# -- what a library raises


def test_what_raises_in_a_worker_names_its_line(tmp_path, monkeypatch):
    inner = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}))  # it knows no other word
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    fast.save_pretrained(tmp_path)
    deep = "[" * 900 + "]" * 900
    encode = encoder_of(str(tmp_path))
    lines = [answer("a"), answer("b")]
    documents = [document_of({"m": line}, n) for n, line in enumerate(lines, 1)]
    documents.append(
        Document("x.jsonl", 3, f'{{"m": {json.dumps(CHAT)}, "x": {deep}}}'.encode(), 0)
    )
    for n in (0, 1):
        documents[n] = document_of({"m": [{"role": "user", "content": "a"}, lines[n][1]]}, n + 1)
    chunk = encode(documents)
    assert len(chunk.lengths) == 1
    assert chunk.bad[0].startswith("x.jsonl:2: the tokenizer refuses it: ")
    assert chunk.bad[1].startswith("x.jsonl:3: ")

    def fail(_document):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(encode._template, "_read", fail)
    with pytest.raises(KeyError) as caught:
        encode(documents)
    assert "x.jsonl:1: while this was encoded" in "".join(traceback.format_exception(caught.value))
