"""tools/generate.py on converted models: tokens as in training, positions, a moved directory."""

import datetime
import json
import shutil
from argparse import Namespace
from dataclasses import asdict

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import parse_args

from megatron_mdm.conversion import family
from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.data.fingerprint import fingerprint
from megatron_mdm.data.load_tokenizer import load_hugging_face
from megatron_mdm.data.pairs import PairKeys
from megatron_mdm.data.preprocess import preprocess
from megatron_mdm.generation.decoder import Decoder
from megatron_mdm.generation.prompts import read_conversations
from megatron_mdm.mcore.inference.eval_data import (
    chat_encoder,
    encoder,
    read_tokens,
    spells_special_tokens,
    vocab_size,
)
from megatron_mdm.mcore.inference.loaded_model import LoadedModel
from megatron_mdm.mcore.tokenizer import tokenizer_data
from tests import ranks
from tests.conversion import models
from tests.ranks import entries

# This tokenizer puts <s> before every text, has holes in its ids, and has no end of document.
BOS, MASK = 80, 90
WORDS = {f"w{i}": i for i in range(80)}
WORDS |= {"<s>": BOS, "<unk>": 81, "<|mdm_mask|>": MASK, "last": 95}
SPECIAL = {"bos_token": "<s>", "mask_token": "<|mdm_mask|>"}


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A converted model for rows of 8 tokens, with 64 positions, moved after the conversion."""
    root = tmp_path_factory.mktemp("moved")
    source = models.make("llada", root / "hf", mask_token_id=MASK)
    models.write_tokenizer(source, WORDS, **SPECIAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "DEFAULT_SEQ_LENGTH", 8)
        to_megatron(str(source), str(root / "mg"), log=lambda line: None)
    assert "--seq-length 8 " in (root / "mg" / "launch.txt").read_text()
    return (root / "mg").rename(root / "elsewhere")


def generate(directory, load, *flags, check=True):
    command = ["tools/generate.py", "--device", "cpu", "--load", str(load), *flags]
    run = ranks.launch(directory, 1, "--", *command, entry=entries.tool, check=check)
    return (directory / "stdout0").read_text() if check else run.output[0]


def test_given_tokens_stand_where_they_stand_in_training(moved, tmp_path):
    flags = ["--prompt", "w1 w2<mask>w3", "--prompt", "<s> w1 <unk>", "--suffix", "w4"]
    lines = generate(tmp_path, moved, *flags, "--length", "30", "--steps", "3").splitlines()
    first, second = lines[1].split(), lines[3].split()
    # The texts are longer than the training rows, which rotary positions allow.
    assert len(first) == 4 + 30 + 1 and len(second) == 3 + 30 + 1
    assert (first[:2], first[3], first[-1]) == (["w1", "w2"], "w3", "w4")
    assert (second[:3], second[-1]) == (["<s>", "w1", "<unk>"], "w4")


def test_a_shifted_model_begins_a_text_after_the_end_of_another(tmp_path):
    """The logits of its first position, which predict no token in training, are not used."""
    source = models.make("dream", tmp_path / "hf")
    to_megatron(str(source), str(tmp_path / "mg"), log=str)
    flags = ["--length", "5", "--no-stop-at-eos", "--prompt", "", "--prompt", "<mask>7"]
    lines = generate(tmp_path / "both", tmp_path / "mg", *flags).splitlines()

    def logits(tokens):
        own = models.logits(source, tokens, causal=False)
        return torch.cat([own[:, :1], own[:, :-1]], dim=1)

    end, decoder = models.DREAM["eos_token_id"], Decoder(MASK, vocab_size=models.VOCAB)
    for line, row in ((lines[1], [MASK] * 5), (lines[3], [MASK, 7, *[MASK] * 5])):
        expected = decoder(logits, torch.tensor([[end, *row]]))[0, 1:]
        assert line.split() == [str(token) for token in expected.tolist()]
        alone = decoder(logits, torch.tensor([row]))[0]
        assert not torch.equal(alone, expected)  # the first position alone says another text
    flags = ["--length", "3", "--show", "--no-stop-at-eos"]
    assert generate(tmp_path / "show", tmp_path / "mg", *flags).startswith("step 0: ▒▒▒\n")

    words = {f"w{i}": i for i in range(80)} | {"<unk>": 80}
    models.write_tokenizer(tmp_path / "hf", words, mask_token="w79")
    to_megatron(str(source), str(tmp_path / "endless"), log=str)
    log = generate(tmp_path / "none", tmp_path / "endless", "--length", "5", check=False)
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "prompt 1: a shifted model (--mdm-shift) cannot write the first token" in line


def test_a_model_without_a_mask_token(converted, tmp_path):
    log = generate(tmp_path, converted("llama")[1], "--prompt", "1 2", check=False)
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "has no mask token, and so nothing to fill in" in line and "Traceback" not in log


def test_a_tokenizer_that_cannot_be_read(moved, tmp_path):
    damaged = shutil.copytree(moved, tmp_path / "damaged")
    (damaged / "huggingface" / "tokenizer.json").write_text("{}")
    log = generate(tmp_path, damaged, "--prompt", "w1", check=False)
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert str(damaged / "huggingface") in line and "Traceback" not in log


def test_special_tokens_in_prompts_are_those_of_the_data(moved, tmp_path):
    prompt = ["--prompt", "w1<s>w2", "--length", "1", "--steps", "1"]
    assert generate(tmp_path / "a", moved, *prompt).split()[:3] == ["w1", "<s>", "w2"]
    flags = [*prompt, "--no-special-tokens"]
    assert generate(tmp_path / "b", moved, *flags).split()[0] == "<unk>"


# Users speak after <s>, the assistant after w7. The date is written if there is a system message.
TEMPLATE = "{% if messages[0].role == 'system' %}{{ strftime_now('w%-d ') }}{% endif %}"
TEMPLATE += "{% for m in messages %}{{ {'user': '<s> ', 'assistant': 'w7 '}[m.role] if m.role in "
TEMPLATE += "['user', 'assistant'] }}{{ m.content }} {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}{{ 'w7 ' }}{% endif %}"


def conversation(*contents, system=None):
    """Messages of a user and the assistant by turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """A converted model whose tokenizer has a chat template."""
    root = tmp_path_factory.mktemp("chatting")
    source = models.make("llada", root / "hf", mask_token_id=MASK)
    models.write_tokenizer(source, WORDS, **SPECIAL, chat_template=TEMPLATE)
    to_megatron(str(source), str(root / "mg"), log=lambda line: None)
    return root / "mg"


def test_prompts_of_conversations_are_those_of_training(chatting, monkeypatch, tmp_path):
    """Every token is equal: with several turns, with dates, and with keys left out."""
    asked = [
        conversation("w1 w2"),
        conversation("w1 w2", "w3", "w4"),
        conversation("w5", system="w6"),
    ]
    directory = str(chatting / "huggingface")
    rows = [{"messages": [*m, {"role": "assistant", "content": "w9"}], "n": 1} for m in asked]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    date = datetime.date(2020, 2, 3)
    keys = PairKeys(messages="messages", template=directory, ignored=("n",), date=date)
    preprocess(
        [str(tmp_path / "x.jsonl")], str(tmp_path / "x"), load_hugging_face(directory),
        pairs=keys, append_eod=False, workers=1, progress=False,
    )  # fmt: skip
    dataset = IndexedDataset(str(tmp_path / "x"))
    trained = [dataset[2 * n].tolist() for n in range(len(asked))]
    assert trained == [[BOS, 1, 2, 7], [BOS, 1, 2, 7, 3, BOS, 4, 7], [3, 6, BOS, 5, 7]]
    monkeypatch.setattr("sys.argv", ["", "--tokenizer-type", "HuggingFaceTokenizer"])
    args = parse_args(ignore_unknown_args=True)
    args.tokenizer_model, args.rank = directory, 0
    args.mdm_data = [{"template_date": None}, {"template_date": date.isoformat()}]
    chat = chat_encoder(LoadedModel(None, args, None), "messages", ["n"])
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps({"messages": m, "n": 1}) + "\n" for m in asked))
    assert [chat.prompt(document) for document in read_conversations(str(file))] == trained
    # A single conversation over several lines: an object, or its messages.
    for value in ({"messages": asked[1], "n": 2}, asked[1]):
        file.write_text(json.dumps(value, indent=2))
        assert [chat.prompt(d) for d in read_conversations(str(file))] == trained[1:2]


def test_answers_to_conversations(chatting, tmp_path):
    asked = [conversation("w1 w2"), conversation("w1 w2", "w3", "w4")]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in asked))
    flags = ["--length", "5", "--no-stop-at-eos"]
    lines = generate(tmp_path / "a", chatting, *flags, "--messages", str(file)).splitlines()
    assert lines[::2] == ["== prompt 1", "== prompt 2"]
    for line, prompt in ((lines[1], "<s> w1 w2 w7"), (lines[3], "<s> w1 w2 w7 w3 <s> w4 w7")):
        whole = generate(tmp_path / prompt, chatting, *flags, "--prompt", prompt)
        assert whole.split() == [*prompt.split(), *line.split()] and line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]\n", "asked.json:1: no list of messages"),
        ("", "holds no conversation"),
        ('[{"messages": []}]', "asked.json holds a JSON array"),
        (json.dumps({"messages": conversation("w1", "w2")}), "is the assistant's: leave it out"),
        (json.dumps({"messages": conversation("w1"), "id": 1}), 'the same without the key "id"'),
    ],
)
def test_conversations_that_cannot_be_asked(chatting, tmp_path, text, message):
    file = tmp_path / "asked.json"
    file.write_text(text)
    log = generate(tmp_path, chatting, "--messages", str(file), check=False)
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in log


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, True),
        ({"mdm_data": None}, True),
        ({"mdm_data": []}, True),
        ({"mdm_data": [{"special_tokens": None}]}, True),
        ({"mdm_data": [{"special_tokens": False}, {}]}, True),
        ({"mdm_data": [{"special_tokens": False}, {"special_tokens": True}]}, True),
        ({"mdm_data": [{"special_tokens": False}] * 2}, False),
    ],
)
def test_the_rule_of_a_checkpoint_is_that_of_all_its_data(known, expected):
    assert spells_special_tokens(Namespace(**known)) == expected


def test_texts_are_encoded_as_preprocessing_does(moved, monkeypatch, tmp_path):
    directory = str(moved / "huggingface")
    monkeypatch.setattr("sys.argv", ["", "--tokenizer-type", "HuggingFaceTokenizer"])
    args = parse_args(ignore_unknown_args=True)
    args.tokenizer_model, args.rank = directory, 0
    args.mdm_vocab_size = 96
    loaded = LoadedModel(None, args, build_tokenizer(args))
    text = "w1 <s> w2 last"
    assert loaded.tokenizer.tokenize(text) == [BOS, 1, BOS, 2, 95]  # training saw no leading <s>
    assert encoder(loaded)(text) == load_hugging_face(directory).load()(text)
    assert encoder(loaded, special=True)(text) == [1, BOS, 2, 95]
    assert (vocab_size(loaded), loaded.tokenizer.vocab_size) == (96, 84)
    recorded = load_common_state_dict(str(moved / "release"))["args"].mdm_tokenizer
    assert recorded == asdict(fingerprint(tokenizer_data(loaded.tokenizer)))
    # If no token ends documents, texts have no end.
    (tmp_path / "text.jsonl").write_text('{"text": "w1 w2"}\n{"text": "w3"}\n')
    read = read_tokens(loaded, str(tmp_path / "text.jsonl"), "text", 9, seed=0)
    assert [ids.tolist() for ids in read.ids] == [[1, 2], [3]] and read.num_bytes == 7
    whole = read_tokens(loaded, str(tmp_path / "text.jsonl"), "text", 9, seed=0, file_format="text")
    assert len(whole.ids) == 1 and whole.num_bytes == (tmp_path / "text.jsonl").stat().st_size
    assert [LoadedModel(None, args, Namespace(eod=eod)).end_token_id for eod in (None, -1, 5)] == [
        None,
        None,
        5,
    ]
