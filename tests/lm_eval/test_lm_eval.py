"""Tasks of lm-evaluation-harness, from local files, on a converted checkpoint.

Expected values come from the published network: likelihoods over all masks, and texts that
`Decoder` writes from its logits. At each start, lm_eval takes seconds to index its tasks. Three
starts are tested nevertheless, because users have three ways in: the tool, lm_eval's own command,
and ranks that share a model.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import parse_args

from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.errors import UserError
from megatron_mdm.generation.decoder import Decoder
from megatron_mdm.lm_eval.checkpoint_model import CheckpointModel, adapter_arguments
from megatron_mdm.lm_eval.harness import HarnessModel
from megatron_mdm.lm_eval.tasks import ask, generation_settings, load_tasks, task_manager
from megatron_mdm.mcore.flags.arguments import add_arguments
from megatron_mdm.mcore.inference.loaded_model import LoadedModel
from megatron_mdm.objective.reference import objective_coefficients, patterns
from tests import ROOT, ranks
from tests.conversion import models
from tests.ranks import entries

pytest.importorskip("lm_eval", reason="lm_eval is not installed: [eval]")

END, MASK = 81, 90
WORDS = {f"w{i}": i for i in range(78)} | {"0": 78, "<unk>": 79}
WORDS |= {"<end>": END, "<user>": 82, "<bot>": 83, "<|mdm_mask|>": MASK}
SPECIAL = {"eos_token": "<end>", "mask_token": "<|mdm_mask|>"}
SPECIAL |= {"extra_special_tokens": ["<user>", "<bot>"]}
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}"
    "{{ ' <end> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)
# The metric uses the library `evaluate`, which tools/evaluate.py must not hide.
METRIC = """
import evaluate


def same(references, predictions, **_):
    assert issubclass(evaluate.Metric, evaluate.EvaluationModule)
    return float(references[0] == predictions[0])
"""
BARE = {"function": "regex", "regex_pattern": r"\s*(.*\S)"}
SETTINGS = {"steps": 4, "block_length": 3}
LENGTH = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tiny LLaDA over words, as published (hf) and converted (mg)."""
    root = tmp_path_factory.mktemp("model")
    source = models.make("llada", root / "hf", mask_token_id=MASK)
    models.write_tokenizer(source, WORDS, **SPECIAL)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    to_megatron(str(source), str(root / "mg"), log=lambda line: None)
    return root


def ids(text):
    return [WORDS[word] for word in text.split()]


def words(tokens):
    names = {i: word for word, i in WORDS.items()}
    return "".join(" " + names.get(i, "") for i in tokens)


def logits(model):
    return lambda tokens: models.logits(model / "hf", tokens, causal=False)


def bound(model, context, answer):
    """The bound on log p of an answer, over all its masks, by the objective's oracle."""
    before, after = ids(context), torch.tensor(ids(answer))
    n = len(after)
    masks = torch.tensor(patterns(n))
    rows = torch.where(masks, MASK, after)
    rows = torch.cat([torch.tensor(before).expand(len(rows), -1), rows], dim=1)
    log_p = logits(model)(rows)[:, len(before) :].double().log_softmax(-1)
    nats = -log_p.gather(-1, after.expand(len(rows), n)[..., None])[..., 0].numpy()
    return -n * float((objective_coefficients([True] * n, eps=0.0) * nats).sum())


def text(model, context):
    """The text that follows a context."""
    decoder = Decoder(MASK, **SETTINGS, end_token_ids=(END,), vocab_size=96)
    row = torch.tensor([[*ids(context), *[MASK] * LENGTH]])
    tokens = decoder(logits(model), row)[0, len(ids(context)) :].tolist()
    return words(tokens[: tokens.index(END)] if END in tokens else tokens)


@pytest.fixture(scope="module")
def tasks(model, tmp_path_factory):
    """A directory with two tasks: 8 choices, 5 answered correctly, and 4 texts, 1 correct.

    The texts end at a word that occurs in the middle of the first text.
    """
    directory = tmp_path_factory.mktemp("tasks")
    choices, texts = [], []
    for i in range(8):
        start = f"w{i} w{3 * i + 1} w{i + 40}"
        answers = [f"w{i + 9}", f"w{50 - i} w{i}", f"w5 w{i + 20} w7 w{i + 30}"]
        bounds = [bound(model, start, answer) for answer in answers]
        best = bounds.index(max(bounds))
        gold = best if i < 5 else (best + 1) % 3
        choices.append({"start": start, "answers": answers, "gold": gold, "bounds": bounds})
    end = text(model, "w1 w2").split()[3]
    for i in range(4):
        start = f"w{i + 1} w{2 * i + 2}"
        goal = text(model, start).split(end)[0].strip()
        texts.append({"start": start, "goal": goal if i == 0 else "w0", "end": end})
    common = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{start}}"}
    own = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_target": "gold",
            "doc_to_choice": "answers",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "texts": {
            "output_type": "generate_until",
            "doc_to_target": "{{goal}}",
            "generation_kwargs": {"until": [end], "max_gen_toks": LENGTH},
            "filter_list": [{"name": "bare", "filter": [BARE, {"function": "take_first"}]}],
        },
    }
    (directory / "metric.py").write_text(METRIC)
    for name, rows in (("choices", choices), ("texts", texts)):
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")}
        task = {"task": f"words_{name}", "tag": "words", "dataset_kwargs": files}
        # YAML is a superset of JSON. Only YAML can name a function of a file beside it.
        lines = [f"{k}: {json.dumps(v)}" for k, v in {**common, **own[name], **task}.items()]
        if name == "texts":
            lines += ["metric_list:", "- metric: !function metric.same"]
            lines += ["  aggregation: mean", "  higher_is_better: true"]
        (directory / f"{name}.yaml").write_text("\n".join(lines))
    return directory


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


def flags(model, tasks):
    return [
        *("--device", "cpu", "--load", str(model / "mg"), "--include-path", str(tasks)),
        *("--steps", str(SETTINGS["steps"]), "--block-length", str(SETTINGS["block_length"])),
    ]


def samples(path):
    """Task -> the records of its questions."""
    found = {}
    for line in path.read_text().splitlines():
        sample = json.loads(line)
        found.setdefault(sample["task"], []).append(sample)
    return found


def test_answers_are_those_of_the_published_network(model, tasks, tmp_path):
    """Starts the tool as a user does."""
    end = json.loads((tasks / "texts.jsonl").read_text().splitlines()[0])["end"]
    outputs = ["--json", str(tmp_path / "out.json"), "--log-samples", str(tmp_path / "out.jsonl")]
    command = [sys.executable, "tools/evaluate.py", *flags(model, tasks), *outputs]
    run = subprocess.run([*command, "--tasks", "words"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "|words_choices|" in run.stdout and "0.625" in run.stdout
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["results"]["words_choices"]["acc,none"] == 5 / 8
    assert results["results"]["words_texts"]["same,bare"] == 1 / 4
    assert results["config"]["model_args"]["draws"] == 64
    found = samples(tmp_path / "out.jsonl")
    for sample in found["words_choices"]:
        bounds = [value for ((value, _),) in sample["resps"]]
        assert bounds == pytest.approx(sample["doc"]["bounds"], rel=1e-5)
    for sample in found["words_texts"]:
        start = sample["doc"]["start"]
        assert sample["resps"] == [[text(model, start).split(end)[0]]]


def test_conversations_through_the_command_of_lm_eval(model, tasks, tmp_path):
    """The model is selected by its registered name, and --model_args has its settings."""
    arguments = ",".join(f"{key}={value}" for key, value in SETTINGS.items())
    command = [sys.executable, "-m", "megatron_mdm.lm_eval", "run", "--model", "mdm"]
    command += ["--model_args", f"load={model / 'mg'},{arguments}", "--device", "cpu"]
    command += ["--batch_size", "4", "--tasks", "words_texts", "--include_path", str(tasks)]
    command += ["--apply_chat_template", "--output_path", str(tmp_path / "out"), "--log_samples"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("samples_words_texts_*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 4
    for sample in lines:
        asked = f"<user> {sample['doc']['start']} <end> <bot> "
        assert sample["arguments"]["gen_args_0"]["arg_0"] == asked
        assert sample["resps"] == [[text(model, asked).split(sample["doc"]["end"])[0]]]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(path.read_text())["chat_template"] == TEMPLATE


def test_ranks_that_share_the_model_answer_alike(model, tasks, tmp_path):
    """Each question comes after an example. Only the first rank prints results."""
    output = tmp_path / "out.jsonl"
    command = ["tools/evaluate.py", *flags(model, tasks), "--log-samples", str(output)]
    command += ["--tasks", "words_choices,words_texts", "--num-fewshot", "1", "--limit", "3"]
    ranks.launch(tmp_path, 2, "--", *command, entry=entries.tool)
    assert "|words_texts" in (tmp_path / "stdout0").read_text()
    assert (tmp_path / "stdout1").read_text() == ""
    found = samples(output)
    assert [len(rows) for rows in found.values()] == [3, 3]
    for sample in found["words_choices"]:
        bounds = [value for ((value, _),) in sample["resps"]]
        expected = [bound(model, *arguments) for arguments in sample["arguments"]]
        assert bounds == pytest.approx(expected, rel=1e-5)
        assert {len(context.split("\n\n")) for context, _ in sample["arguments"]} == {2}
    for sample in found["words_texts"]:
        ((context, settings),) = sample["arguments"]
        assert sample["resps"] == [[text(model, context).split(settings["until"][0])[0]]]


@pytest.fixture(scope="module")
def manager(tasks):
    text = (tasks / "choices.yaml").read_text()
    text = text.replace("words_choices", "words_gone").replace("choices.jsonl", "gone.jsonl")
    (tasks / "gone.yaml").write_text(text.replace('tag: "words"', 'tag: "gone"'))
    return task_manager(str(tasks))


@pytest.mark.slow
def test_tasks_are_named_by_tags_patterns_and_files(manager, tasks):
    file = str(tasks / "texts.yaml")
    for names, expected in (
        (["words"], {"words_choices", "words_texts"}),
        (["words_ch*"], {"words_choices"}),
        ([f"{file},words_choices"], {"words_choices", "words_texts"}),
    ):
        assert {task.task_name for task in load_tasks(manager, names)} == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("words_choice", "lm_eval has no such task: did you mean words_choices"),
        ("humaneval", "--tasks humaneval runs code that the model writes: add --confirm-run"),
        ("mmmu_val_art", "--tasks mmmu_val_art contains pictures or sounds"),
        ("words_gone", "--tasks words_gone cannot be loaded: FileNotFoundError: .*gone.jsonl"),
    ],
)
def test_tasks_that_cannot_be_asked_are_one_line(manager, name, message):
    with pytest.raises(UserError, match=message):
        load_tasks(manager, [name])


class Refusing(HarnessModel):
    """An adapter whose network must not be called."""

    def __init__(self):
        super().__init__(None, lambda text: [1] * len(text.split()), MASK, 64, decode=words)


def test_what_cannot_be_answered_is_one_line_before_anything_is_computed(manager):
    """This includes a task that comes last."""
    for settings, message in (
        ({"gen_kwargs": {"min_p": 0.1, "temperature": 1.0}}, "has min_p 0.1, which the decoder"),
        ({"gen_kwargs": {"max_gen_toks": 64}}, "max_gen_toks 64 must be 1 to 63"),
        (
            {"num_fewshot": 9},
            r"words_choices: cannot build the questions with 9 examples \(--num-fewshot\): V",
        ),
        ({"num_fewshot": 5}, "words_texts: cannot build the questions with 5 examples"),
    ):
        tasks = load_tasks(manager, ["words_choices", "words_texts"])
        with pytest.raises(UserError, match=message):
            ask(Refusing(), tasks, manager, limit=2, **settings)
    # A later failure is not reported as a mistake of the user.
    with pytest.raises(TypeError, match="NoneType"):
        ask(Refusing(), load_tasks(manager, ["words_texts"]), manager)


def test_settings_of_texts_are_those_of_a_task():
    """Strings that end a text may contain a comma or look like a number."""
    given = [("until", "a b,c"), ("steps", "4"), ("until", "1.50"), ("do_sample", "true")]
    expected = {"until": ["a b,c", "1.50"], "steps": 4, "do_sample": True}
    assert generation_settings(given) == expected


def test_a_directory_of_tasks_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="--include-path .*absent is not a directory"):
        task_manager(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks x", "--tasks needs lm-evaluation-harness: pip install 'megatron-mdm[eval]'"),
        ("--tasks x --rows 3", "--rows is of no effect without --data"),
        ("--data x --block-length 3", "--block-length is of no effect without --tasks"),
        ("--tasks x --draws 6", "--draws must be a multiple of 4 with --tasks, got 6"),
        ("--tasks x --limit 0", "--limit 0: must be a whole number, or a share below 1"),
        ("--tasks x --limit nan", "--limit nan: must be a whole number, or a share below 1"),
        ("--tasks x --limit 2.5", "--limit 2.5: must be a whole number, or a share below 1"),
        ("--tasks x --gen-kwargs foo", "--gen-kwargs foo: must have the form NAME=VALUE"),
        ("--tasks x --json tests", "--json tests is a directory: give the name of a file"),
        (
            "--tasks x --log-samples /dev/null/x",
            "--log-samples /dev/null/x: cannot create a file in /dev/null: give another path",
        ),
        ("--tasks x --num-fewshot -1", "--num-fewshot -1: must not be negative"),
    ],
)
def test_flags_that_cannot_be_are_one_line(words, message):
    """lm_eval is not installed here."""
    flags = ["--load", "x", "--device", "cpu", *words.split()]
    run = ranks.run_forked("tools/evaluate.py", *flags, without=["lm_eval"])
    assert (run.returncode, run.stderr.splitlines()) == (2, [f"error: {message}"])


def test_arguments_of_the_model_that_are_wrong_are_one_line(model):
    for arguments, message in (
        ({}, "--model_args load=DIR is missing"),
        ({"load": "x", "stepz": 3}, "--model_args stepz is unknown: there are draws, seed"),
        ({"load": "x", "batch_size": "auto"}, "--batch_size auto: give a number of rows"),
        ({"load": "x", "device": "tpu"}, "--device tpu: cuda or cpu"),
    ):
        with pytest.raises(UserError, match=message):
            CheckpointModel(**arguments)


@pytest.fixture
def loaded(model, monkeypatch):
    """The checkpoint without its network."""
    monkeypatch.setattr("sys.argv", ["", "--tokenizer-type", "HuggingFaceTokenizer"])
    args = parse_args(add_arguments, ignore_unknown_args=True)
    args.tokenizer_model, args.rank = str(model / "mg" / "huggingface"), 0
    args.max_position_embeddings, args.mdm_mask_token_id, args.mdm_data = 64, MASK, None
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    return LoadedModel(None, args, build_tokenizer(args))


def test_conversations_are_rendered_as_for_training(loaded):
    """A continued answer has no end, special tokens are encoded, and refusals are one line."""
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    model = HarnessModel(**adapter_arguments(loaded))
    assert model.apply_chat_template(chat[:1]) == "<user> w1 <end> <bot> "
    assert model.apply_chat_template(chat, add_generation_prompt=False).endswith("<bot> w2")
    assert model.chat_template(True) == TEMPLATE and model.chat_template(False) == ""
    assert model._ids("w1<user>w2") == [1, 82, 2]
    loaded.args.mdm_data = [{"special_tokens": False}]
    plain = HarnessModel(**adapter_arguments(loaded))
    assert plain._ids("w1<user>w2") == [79]
    with pytest.raises(UserError, match="writes special tokens, .*: add --special-tokens"):
        plain.apply_chat_template(chat)
    assert HarnessModel(**adapter_arguments(loaded, special_tokens=True)).apply_chat_template(chat)
    inner = loaded.tokenizer._tokenizer.tokenizer
    inner.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="the chat template refuses .*: no system role"):
        HarnessModel(**adapter_arguments(loaded, special_tokens=True)).apply_chat_template(chat)
    inner.chat_template = "{{ strftime_now('%Y') }}"
    dated = HarnessModel(**adapter_arguments(loaded, special_tokens=True))
    assert dated.apply_chat_template(chat).strip() == "2024"
    loaded.args.mdm_data = [{"template_date": "2031-05-06"}, {"template_date": None}]
    dated = HarnessModel(**adapter_arguments(loaded, special_tokens=True))
    assert dated.apply_chat_template(chat).strip() == "2031"
    inner.chat_template = {"tool_use": TEMPLATE, "plain": TEMPLATE}
    named = HarnessModel(**adapter_arguments(loaded, special_tokens=True))
    assert named.chat_template(False) == ""
    for use in (lambda: named.apply_chat_template(chat), lambda: named.chat_template(True)):
        with pytest.raises(UserError, match="templates plain, tool_use and none named default"):
            use()
    inner.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        HarnessModel(**adapter_arguments(loaded)).apply_chat_template(chat)


def test_an_answer_ends_where_the_template_ends_it(loaded):
    """As LLaDA's template, which ends answers with a token that is not the end of document."""
    inner = loaded.tokenizer._tokenizer.tokenizer
    for template, ends in (
        (TEMPLATE.replace("<end>", "<user>"), (END, 82)),
        (TEMPLATE, (END,)),
        (TEMPLATE.replace("<end>", "w5"), (END,)),  # not a special token
        ("<user>", (END,)),
        ("{{ raise_exception('no') }}", (END,)),
        ({"tool_use": TEMPLATE}, (END,)),
        (None, (END,)),
    ):
        inner.chat_template = template
        assert adapter_arguments(loaded)["decoder"].end_token_ids == ends
    inner.chat_template = TEMPLATE.replace("<end>", "<user>")

    def answer(tokens):  # w7 <user> w7 <user> ...
        row = torch.tensor([7, 82]).repeat(tokens.shape[1])[: tokens.shape[1]]
        return torch.nn.functional.one_hot(row, 91).float().expand(len(tokens), -1, -1)

    settings = {**adapter_arguments(loaded, max_gen_toks=5), "logits": answer, "decoded": None}
    request = SimpleNamespace(args=("w1 w2", {"until": []}), request_type="generate_until")
    assert HarnessModel(**settings).generate_until([request]) == [" w7"]


def test_rows_are_no_longer_than_the_positions_of_the_model(loaded):
    with pytest.raises(UserError, match="max_length 65: the model has 64 positions"):
        adapter_arguments(loaded, max_length=65)
    with pytest.raises(UserError, match="--eos-token-ids 99999: the vocabulary has no such id"):
        adapter_arguments(loaded, eos_token_ids=[END, 99999])
    found = adapter_arguments(loaded, eos_token_ids=5, steps=7)
    assert (found["max_length"], found["decoder"].vocab_size) == (64, 91)
    assert (found["decoder"].end_token_ids, found["decoder"].steps) == ((5,), 7)
