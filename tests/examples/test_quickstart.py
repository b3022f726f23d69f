"""The quickstart: what its samples are measured by, and its flags. It is not run itself."""

import ast
import json
import subprocess

import pytest

from megatron_mdm.data.load_tokenizer import load_sentencepiece
from megatron_mdm.data.preprocess import preprocess
from tests import ROOT, ranks
from tests.data.texts import SOURCE, train_on_source


@pytest.fixture
def program(monkeypatch):
    """The measuring program as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import quickstart_samples

    return quickstart_samples


@pytest.mark.parametrize(
    ("written", "passes", "parsed"),
    [
        ("    return a\n", True, 1),
        ("    return a\n    retu", True, 1),  # without a line end: left out
        ("    return a\n    print(\n        a,\n", True, 1),  # a bracket is open
        ('    return a\n    """never\n    closed\n', False, 1),
        ('    """never\n    closed\n', False, 0),
        ('    print("""never\n    closed\n', False, 0),
        ('    """closed"""\n', False, 1),  # strings alone
        ('    """closed"""\n    f"{a}"\n    print(\n', False, 2),
        ('    """closed"""\n    return a\n', True, 2),
        ("    return a\n\ndef g():\n", True, 2),  # a blank line is accepted too
        ("    return a\n)\n    return a\n", False, 1),
        ("    return a\n        return a\n", False, 1),
        ("    if a:\n", False, 0),  # nothing complete
        ("    print(\n        a b\n", False, 0),
        ("    return", False, 0),
        ("", False, 0),
    ],
)
def test_complete_statements(program, written, passes, parsed):
    prompt = "def f(a):\n"
    found = program.measured(0, prompt, prompt + written, "")
    assert (found.passes, found.parsed_lines) == (passes, parsed)
    assert found.lines == written.count("\n")


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ("print(len)", "11"),
        ("a = b\nc = a", "01"),
        ("a = a", "0"),
        ("a += b\na", "01"),
        ("(a := b) + a", "01"),
        ("a: b = c", "00"),
        ("for a in b: a\nelse: a", "011"),
        ("[a for a in b for c in a if c]", "1011"),
        ("def f(a, *c: d, **e): return a, c, e, f, g", "011110"),
        ("lambda a: a + b", "10"),
        ("class B(C):\n    def g(self): return self, g, B", "0111"),
        ("import a.b, c as d\nfrom e import f\na, b, c, d, f", "10011"),
        ("try: pass\nexcept A as b: b", "01"),
        ("with a as b: b", "01"),
        ("match a:\n    case [b, *c]: b, c\n    case {'x': d, **e}: d, e", "01111"),
    ],
)
def test_names_are_defined_before_use(program, text, reads):
    found = list(program.names_read(ast.parse(text), 0))
    assert "".join(str(int(known)) for known in found) == reads


def test_names_of_the_prompt_are_not_counted_and_define_others(program):
    prompt = "def f(a, b=c):\n"
    found = program.measured(0, prompt, f"{prompt}    d = a + e\n    return d\n", "")
    assert (found.names, found.defined) == (3, 2)


def test_the_longest_copy(program):
    assert program.longest_copy("xx return self.a yy", "a\0 return self.b\0y") == " return self."
    assert program.longest_copy("abc", "c b a") == "a"
    assert program.longest_copy("", "a") == program.longest_copy("a", "") == ""


def test_prompts_are_no_complete_statements(program):
    assert len(set(program.PROMPTS)) == 20
    for prompt in program.PROMPTS:
        assert program.tree_of(prompt) is None and program.is_cut_off(prompt)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of two steps on one module, whose text is its training and held-out text."""
    root = tmp_path_factory.mktemp("quickstart")
    model = train_on_source(root)
    preprocess([str(root / "a.py")], str(root / "text"), load_sentencepiece(str(model)))
    ranks.launch(
        root / "run",
        1,
        *["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)],
        *["--data-path", str(root / "text"), "--data-cache-path", str(root / "cache")],
        *["--split", "100,0,0", "--train-iters", "2", "--save-interval", "2"],
        *["--save", str(root / "checkpoint"), "--seq-length", "64"],
        *["--max-position-embeddings", "64"],
        drop=["--null-tokenizer-eod-id", "--mdm-mask-token-id", "--vocab-size"],
    )
    (root / "training.txt").write_text(f"{root / 'a.py'}\n")
    return root


def samples(trained, *flags):
    return ranks.run_forked(
        "examples/quickstart_samples.py",
        *["--load", str(trained / "checkpoint"), "--device", "cpu", "--length", "12"],
        *["--training", str(trained / "training.txt"), "--held-out", str(trained / "text")],
        *["--rows", "20", "--temperature", "1", "--json", str(trained / "samples.json"), *flags],
    )


def test_a_checkpoint_is_measured(trained, program):
    run = samples(trained)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads((trained / "samples.json").read_text())
    assert [x["number"] for x in found["samples"]] == list(range(20))
    for prompt, x in zip(program.PROMPTS, found["samples"], strict=True):
        assert x["text"].startswith(prompt) and x["copied"] in SOURCE and x["copied"]
        assert x["copied"] in x["text"][len(prompt) :]
    assert found["passing"] == sum(x["passes"] for x in found["samples"])
    assert 1 < found["nats_per_byte"] < 5
    median = found["samples"][found["median_sample"]]
    assert median["text"].rstrip("\n") in run.stdout
    assert samples(trained).stdout == run.stdout


def test_a_prompt_that_was_trained_on_is_refused(trained, program, tmp_path):
    (tmp_path / "b.py").write_text(f"a = 1\n{program.PROMPTS[3]}    pass\n")
    (tmp_path / "list").write_text(f"{tmp_path / 'b.py'}\n")
    run = samples(trained, "--training", str(tmp_path / "list"))
    assert run.returncode == 2
    line = f"error: --training {tmp_path / 'list'}: it contains the prompt {program.PROMPTS[3]!r}\n"
    assert run.stderr == line


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--rows", "-3"], "--rows -3: must be at least 1"),
        (["--rows", "0"], "--rows 0: must be at least 1"),
        (["--length", "0"], "--length 0: must be at least 1"),
        (["--draws", "1"], "--draws 1: must be at least 2"),
    ],
)
def test_numbers_that_cannot_work_are_one_line(flags, line):
    given = [word for name in ("load", "training", "held-out") for word in (f"--{name}", "x")]
    run = ranks.run_forked("examples/quickstart_samples.py", *given, *flags)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", f"error: {line}\n")


def test_the_copy_that_is_printed_is_of_the_median_sample(program, capsys):
    samples = [
        program.Sample(i, "", f"text {i}", True, 4, parsed, 0, 0, "c" * copied)
        for i, (parsed, copied) in enumerate([(1, 9), (2, 5), (3, 7)])
    ]
    program.report(samples, (1.0, None), None)
    out = capsys.readouterr().out
    assert "9 characters (median sample: 5)" in out and out.endswith("text 1\n")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--steps", "5"], "--steps: no such flag; the only one is --minutes N (5 without it)"),
        (["--minutes"], "--minutes: give a whole number from 3 to 9999"),
        (["--minutes", "2"], "--minutes 2: give a whole number from 3 to 9999"),
        (["--minutes", "0x5"], "--minutes 0x5: give a whole number from 3 to 9999"),
    ],
)
def test_bad_flags_of_the_quickstart_are_one_line(flags, line):
    command = ["bash", "examples/quickstart.sh", *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", f"error: {line}\n")


def test_the_quickstart_says_what_it_does():
    command = ["bash", "examples/quickstart.sh", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "--minutes 60" in run.stdout and "set -e" not in run.stdout
