"""Checks links, anchors and commands of the project's .md files.

`test_commands_run` runs every command of a code block or a table. It runs them in a folder with
tiny files that have the names of the guides (my_text, my.model, checkpoints, ...). A command is
left out if `NOT_RUN` has a reason, or if the page has one in front of its block:
`<!-- not run: REASON -->`.
"""

import argparse
import contextlib
import gzip
import importlib.util
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megatron_mdm.errors import UserError
from megatron_mdm.experiments import autoregressive
from megatron_mdm.mcore.flags import arguments
from megatron_mdm.pretrain import main
from tests import ROOT, guides, ranks
from tests.guides import Command
from tests.ranks import entries
from tests.tiers import LONG

COMMANDS = {page: list(guides.commands(page)) for page in guides.pages()}

# Reasons not to run a command, by a pattern in its text; the first pattern that matches decides.
NOT_RUN = {
    r"^(.* )?\.\.\.( |$)": "a part of a command",
    r"--help": "prints help",
    r"tests/|pytest": "runs the tests",
    r"quickstart\w*\.(sh|py)": "trains for minutes",
    r"CONTAINER=": "needs Slurm: tests/examples/test_pretrain_examples.py has the command line",
    r"REHEARSE=1": "starts processes of its own: tests/rehearse runs launch.sh with it",
    r"finetune/\w+\.sh": "takes minutes: tests/examples/test_continue_examples.py runs one",
    r"reproduce/\w+\.py": "takes minutes or hours: tests/examples/test_reproduce.py runs `ci`",
    r"benchmark\.py": "takes minutes: tests/tools/benchmarks runs them in small",
    r"simulate\.py": "takes minutes: tests/examples/test_fp8_simulation.py runs parts",
    r"kit/": "takes a GPU: tests/examples/test_gpu_kit.py",
    r"--tasks|megatron_mdm\.lm_eval": "fetches tasks and their data",
}
# Pages of measurements keep the commands of their day; the programs may have changed since.
DATED = "tools/benchmarks/results/"
# Values for words in capitals: a number, or the id of the mask token in `my.model`.
STAND_INS = dict.fromkeys("N K X P A B MEAN STD START END NODES GPUS".split(), "1") | {"ID": "3"}


def reason(command: Command) -> str | None:
    """The reason why a command is not run, or None."""
    if command.code.mark:
        return command.code.mark
    if command.code.page.startswith(DATED):
        return "has a date"
    if command.code.kind == "span":
        return "stands in a sentence"
    if command.words[0] == "python" and len(command.words) == 2 + (command.words[1] == "-m"):
        return "names a program"
    text = str(command)
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, text)), None)


def runnable(page: str) -> list[Command]:
    return [command for command in COMMANDS[page] if reason(command) is None]


# Links


@pytest.mark.parametrize("page", guides.pages())
def test_links_and_anchors_lead_somewhere(page):
    for link in guides.links(page):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            assert link.startswith("https://"), link
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            name = target.resolve().relative_to(ROOT).as_posix()
            assert anchor in guides.anchors(name), link


def test_the_readme_is_short():
    assert len(guides.text_of("README.md").splitlines()) <= 200


# Words of commands


class Parsed(BaseException):
    """Ends a program after it has accepted its command line."""


@contextlib.contextmanager
def only_parsing(is_partial: bool):
    """Makes parsers stop the program once they accept its words; abbreviations are refused."""
    original = argparse.ArgumentParser.parse_args

    def parse(parser, args=None, namespace=None):
        make_strict(parser, is_partial)
        original(parser, args, namespace)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        yield patch


def make_strict(parser: argparse.ArgumentParser, is_partial: bool) -> None:
    parser.allow_abbrev = False
    for group in parser._mutually_exclusive_groups:
        group.required = group.required and not is_partial
    for action in parser._actions:
        action.required = action.required and not is_partial
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                make_strict(command, is_partial)


@pytest.fixture(scope="module")
def pretrain_parser():
    """The parser of the program, whose mistakes are a `UserError`."""

    class Built(BaseException):
        pass

    def build(parser):
        raise Built(arguments._quiet_parser(parser))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain"])
        with pytest.raises(Built) as caught:
            arguments.parse_args(build)
    return caught.value.args[0]


def check_words(command: Command, pretrain_parser) -> None:
    """Fails if the program does not exist or refuses the command line."""
    for word in command.words:
        if re.match(r"(\.github|examples|megatron_mdm|tests|tools)/", word):
            assert (ROOT / word.split("::")[0]).exists(), word
    if "--help" in command.words:
        return
    program, words, flags = split(command)
    if program.endswith(".sh"):
        check_script(command, program, words)
    if flags is not None:
        pretrain_parser.parse_args([word for word in flags if word != "..."])
    elif program.endswith(".py") or program == "megatron_mdm.lm_eval":
        with only_parsing(command.is_partial) as patch:
            patch.setattr(sys, "argv", [program, *(word for word in words if word != "...")])
            patch.setattr(sys, "path", [str((ROOT / program).parent), *sys.path])
            patch.chdir(ROOT)
            with pytest.raises(Parsed):
                if program.endswith(".py"):
                    runpy.run_path(program, run_name="__main__")
                else:
                    runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif program.startswith("megatron_mdm"):
        assert importlib.util.find_spec(program), program


def split(command: Command) -> tuple[str, list[str], list[str] | None]:
    """File or module, its words, and those among them that are flags of the training program.

    Words in capitals stand for a number.
    """
    words = [STAND_INS.get(word, word) for word in command.words]
    if words[0] == "torchrun" or words[1:3] == ["-m", "megatron_mdm.launch"]:
        launched = words[1:] if words[0] == "torchrun" else words[3:]
        if "..." in launched and "-m" not in launched:
            return "torchrun", launched, launched
        if "-m" not in launched and not any(word.endswith(".py") for word in launched):
            launched = [*launched, "-m", "megatron_mdm.launch"]  # its words alone
        options = get_args_parser().parse_args([word for word in launched if word != "..."])
        words = ["python", "-m" * options.module, options.training_script]
        words = [*filter(None, words), *options.training_script_args]
    rest = words[1:] if words[1] != "-m" else words[2:]
    program, rest = rest[0], rest[1:]
    if program in ("megatron_mdm.pretrain", "megatron_mdm.experiments.autoregressive"):
        return program, rest, rest
    if program == "examples/pretrain/launch.sh":
        return program, rest, rest[3:] if "..." not in rest else []
    return program, rest, None


def check_script(command: Command, program: str, words: list[str]) -> None:
    """Names of the environment and flags are in the text of a script, or of what it sources."""
    text = (ROOT / program).read_text()
    for sourced in re.findall(r"^\s*source (\S+\.sh)", text, re.M):
        text += (ROOT / sourced).read_text()
    for name in command.environment:
        assert re.search(rf"\b{name}\b", text), name
    if program == "examples/pretrain/launch.sh":
        model = words[0]
        assert model in ("...", "MODEL") or (ROOT / f"examples/pretrain/{model}.flags").exists()
    elif program not in ("tests/run.sh", "tests/compat.sh"):
        assert all(word in text for word in words if word.startswith("--"))


@pytest.mark.slow
@pytest.mark.parametrize("page", [x for x in COMMANDS if COMMANDS[x] and DATED not in x])
def test_programs_know_the_words_of_all_commands(page, pretrain_parser, capsys):
    for command in COMMANDS[page]:
        try:
            check_words(command, pretrain_parser)
        except (SystemExit, UserError, AssertionError) as error:
            said = capsys.readouterr().err.strip().splitlines()[-1:]
            pytest.fail(f"{command.place}: {error} {' '.join(said)}")


def test_blocks_of_python_are_python():
    found = [x for page in guides.pages() for x in guides.codes(page) if x.language == "python"]
    assert found
    for code in found:
        compile(code.text, f"{code.page}:{code.line}", "exec")


# Runs


def test_every_reason_not_to_run_a_command_is_of_use():
    """Prints both lists: the commands that run, and the others with their reasons."""
    found = {str(c): reason(c) for commands in COMMANDS.values() for c in commands}
    for text, why in sorted(found.items(), key=lambda pair: pair[1] or ""):
        print(f"{why or 'run'}: {text}")
    assert set(NOT_RUN.values()) <= set(found.values())
    assert None in found.values()


# Flags that make a training small and short; they stand after those of a guide, and so win.
SHORT = [
    *"--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 32".split(),
    *"--seq-length 32 --max-position-embeddings 256 --micro-batch-size 2".split(),
    *"--mdm-device cpu --global-batch-size 8 --train-iters 2 --lr-warmup-iters 1".split(),
    *"--eval-iters 1 --num-workers 0".split(),
]
# Flags that make a program small enough.
SMALL = {
    "tools/train_tokenizer.py": "--vocab-size 400",
    "tools/evaluate.py": "--device cpu --rows 4 --draws 2",
    "tools/fit_ppots.py": "--device cpu --rates 5 --rows 4 --masks 2",
    "tools/generate.py": "--device cpu",
    "tools/variance_report.py": "--device cpu --rows 8",
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A folder with tiny files of the guides' names, and one checkpoint that all guides share."""
    here = tmp_path_factory.mktemp("stage")
    for name in ("examples", "megatron_mdm", "tools"):
        (here / name).symlink_to(ROOT / name)
    write_texts(here)

    def tool(line, *more):
        run = ranks.run_forked(*line.split(), *more, directory=here)
        assert run.returncode == 0, last_words(run.stderr)

    tool("tools/train_tokenizer.py --input corpus.jsonl.gz --vocab-size 400 --output my.model")
    data = "tools/preprocess_data.py --tokenizer-model my.model --input"
    tool(f"{data} corpus.jsonl.gz --output-prefix my_text")
    tool(f"{data} train.jsonl --prompt-key prompt --response-key response --output-prefix pairs")
    for family, source, output, *more in (
        ("llada", "LLaDA-8B-Base", "llada"),
        ("qwen2", "Qwen2.5-7B", "qwen", "--add-mask-token"),
    ):
        tool(f"examples/tiny_model.py --family {family} --output {source}")
        tool(f"tools/convert_checkpoint.py --to megatron --input {source} --output {output}", *more)
    train(
        here,
        [
            *"--position-embedding-type rope --normalization RMSNorm --swiglu".split(),
            *"--disable-bias-linear --attention-dropout 0 --hidden-dropout 0".split(),
            *"--tokenizer-type SentencePieceTokenizer --tokenizer-model my.model".split(),
            *"--data-path my_text --split 90,10,0 --lr 1e-3 --eval-interval 2".split(),
        ],
        save="checkpoints",
    )
    for source, *copies in (
        ("llada", "runs/llada"),
        ("LLaDA-8B-Base", "my_tokenizer", "runs/tiny/llada"),
        ("Qwen2.5-7B", "runs/tiny/qwen2"),
        ("checkpoints", "runs/quickstart/checkpoint"),
        ("tb", "runs/quickstart/tensorboard"),
    ):
        for copy in copies:
            shutil.copytree(here / source, here / copy)
    for end in (".bin", ".idx", ".json"):
        for copy in ("runs/quickstart/held_out", "package_text", "tests_text"):
            shutil.copy(here / f"my_text{end}", here / f"{copy}{end}")
    return here


def write_texts(here: Path) -> None:
    """Texts, pairs and conversations in files of the guides' names."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text()[:20_000] for path in sorted(library.glob("[a-c]*.py"))]
    texts = [text[i : i + 1000] for text in texts for i in range(0, len(text), 1000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (here / "corpus.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (here / "held_out.jsonl").write_text(lines)
    for name in ("files.txt", "package.txt", "tests.txt"):
        (here / name).write_text("held_out.jsonl\n")
    pair = {"prompt": "Write name 2 times.", "response": "name name"}
    (here / "train.jsonl").write_text((json.dumps(pair) + "\n") * 20)
    question = {"role": "user", "content": pair["prompt"]}
    answer = {"role": "assistant", "content": pair["response"]}
    chat = json.dumps({"messages": [question, answer]})
    (here / "chats.jsonl").write_text(f"{chat}\n" * 20)
    (here / "chat.json").write_text(json.dumps([question]))


def next_tokens() -> None:
    """The program of the same network as an autoregressive model, with the flags after `--`."""
    sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
    main(autoregressive.next_tokens)


def train(
    here: Path,
    flags: list[str],
    save: str = "trained",
    entry: Callable[[], None] = entries.only_these_flags,
) -> None:
    """Trains a tiny model with these flags, in which names are those of files in `here`."""
    own = f"--save {here}/{save} --load {here}/{save} --save-interval 2".split()
    own += f"--tensorboard-dir {here}/tb --data-cache-path {here}/cache".split()
    words = [str(here / word) if is_file(here / word) else word for word in flags]
    count = 2 if any("parallel-size" in word for word in flags) else 1
    ranks.launch(
        here / "log",
        count,
        "--",
        *(word for word in words if word != "--bf16"),
        *SHORT,
        *own,
        entry=entry,
    )


def last_words(output: str) -> str:
    """The line with which a program refuses its input, or the end of its output."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    return "\n".join(errors) or output[-3000:]


def is_file(path: Path) -> bool:
    return path.exists() or path.with_name(f"{path.name}.idx").exists()


def run(command: Command, here: Path) -> None:
    program, words, flags = split(command)
    if program == "examples/pretrain/launch.sh":
        result = subprocess.run(
            ["bash", program, *words],
            cwd=here,
            env={
                **os.environ,
                **command.environment,
                "DRY_RUN": "1",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, last_words(result.stderr)
        assert "megatron_mdm.pretrain" in result.stdout
    elif program == "megatron_mdm.experiments.autoregressive":
        train(here, words, entry=next_tokens)
    elif flags is not None:
        train(here, words)
    else:
        if "--output" in words:  # the reader does not have it yet
            output = here / words[words.index("--output") + 1]
            shutil.rmtree(output, ignore_errors=True)
        small = SMALL.get(program, "").split()
        result = ranks.run_forked(program, *words, *small, directory=here)
        assert result.returncode == 0, last_words(result.stderr)


@pytest.mark.timeout(LONG)
@pytest.mark.parametrize("page", [page for page in guides.pages() if runnable(page)])
def test_commands_run(page, stage, tmp_path):
    """Those of a block one after the other; each block has the files of the stage."""
    done = set()
    for line, block in itertools.groupby(runnable(page), lambda command: command.code.line):
        here = tmp_path / f"line-{line}"
        shutil.copytree(stage, here, symlinks=True)
        for command in block:
            if str(command) in done:
                continue
            done.add(str(command))
            try:
                run(command, here)
            except AssertionError as error:
                pytest.fail(f"{command.place}:\n{last_words(str(error))}")
