"""--help of every program: one sentence, then an example that the program understands."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest

from tests import ROOT

BENCHMARKS = ("data", "gpu", "race", "soak", "throughput", "variance")
# As a user starts them from the root of the repository.
SCRIPTS = [
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").glob("*.py")),
    *(f"tools/benchmark.py {name}" for name in BENCHMARKS),
    *(f"examples/reproduce/{name}.py" for name in ("reproduce", "score", "noise")),
    *("examples/studies/fp8_simulation/simulate.py", "examples/tiny_model.py"),
    "examples/quickstart_samples.py",
]
TRAINING = ("pretrain", "experiments.autoregressive")
OTHERS = ("doctor", "launch", "lm_eval", "rehearse", "sizing.nodes")
MODULES = [f"-m megatron_mdm.{name}" for name in (*TRAINING, *OTHERS)]

# Files that run as __main__ for contributors, another program of ours, or the kit of examples/gpu.
INTERNAL = {
    "megatron_mdm/mcore/flags/page.py",
    "tools/benchmarks/race/texts.py",
    *(f"examples/gpu/kit/{name}.py" for name in ("bench", "figures", "smoke")),
}

# Runs a program whose parser ends it, with status 0, when it has parsed its command line.
PARSE = """
import argparse, runpy, sys
parse = argparse.ArgumentParser.parse_args
def parse_and_end(*args, **values):
    parse(*args, **values)
    sys.exit(0)
argparse.ArgumentParser.parse_args = parse_and_end
sys.argv[:2] = []
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def test_every_program_is_here():
    folders = ("megatron_mdm", "tools", "examples")
    paths = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    guard = re.compile(r'^if __name__ == "__main__":$', re.M)
    found = {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if guard.search(path.read_text(encoding="utf-8"))
    }
    modules = {name.removeprefix("-m ").replace(".", "/") for name in MODULES}
    ours = {f"{name}.py" for name in modules} & found
    ours |= {f"{name}/__main__.py" for name in modules} & found
    assert len(ours) == len(modules)
    assert found == ours | INTERNAL | {name.split()[0] for name in SCRIPTS}


def sentence_and_examples(program, text):
    """The commands of the example, as words after `python`, once the text has the right form."""
    about = re.split(r"\n\n(?=\S)", text)
    if about[0].startswith("usage: "):
        del about[0]
    sentence, *rest = about[0].split("\n\n")
    assert re.fullmatch(r"[A-Z][^\n]*(\n[^\n]+)?\.", sentence), sentence
    assert not re.search(r"[.!?]\s+[A-Z]", sentence), sentence
    lines = rest[0].replace("\\\n", " ").strip("\n").splitlines()
    assert all(line.startswith(f"    python {program} ") for line in lines), lines
    return [shlex.split(line)[1:] for line in lines]


class Parsed(BaseException):
    """The parser of a program has taken its command line."""


@pytest.fixture
def started(monkeypatch):
    """Starts a script in this process, up to its parsed command line."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(*args, **values):
        parse(*args, **values)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setenv("COLUMNS", "100")

    def start(words):
        path = ROOT / words[0]
        monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
        monkeypatch.setattr(sys, "argv", [str(path), *words[1:]])
        runpy.run_path(str(path), run_name="__main__")

    return start


@pytest.mark.parametrize("program", SCRIPTS)
def test_help_of_a_script_begins_with_a_sentence_and_an_example(program, started, capsys):
    with pytest.raises(SystemExit) as ended:
        started([*program.split(), "--help"])
    assert ended.value.code == 0
    for words in sentence_and_examples(program, capsys.readouterr().out):
        with pytest.raises(Parsed):
            started(words)


def run(words, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    result = subprocess.run(
        [sys.executable, *words],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("program", MODULES)
def test_help_of_a_module_begins_with_a_sentence_and_an_example(program, tmp_path):
    text = run([*program.split(), "--help"], tmp_path)
    for words in sentence_and_examples(program, text):
        if program.removeprefix("-m megatron_mdm.") in TRAINING:
            assert "iteration       10/      10" in run(words, tmp_path)
        else:
            run(["-c", PARSE, *words], tmp_path)
