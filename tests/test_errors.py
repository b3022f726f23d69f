"""What is shown of names from elsewhere: one line, and nothing that a terminal would obey."""

import os
import pickle
import subprocess
import sys

import pytest

from megatron_mdm.conversion.to_megatron import bash_quoted
from megatron_mdm.data.preprocess import PreprocessSummary
from megatron_mdm.data.tokenizer import TokenizerSummary
from megatron_mdm.errors import UserError, escaped, exit_with

EVIL = "a\x1b]0;title\x07\x1b[31mred\nerror: forged\r\t\x85\u2028\u202e\udcff"
SHOWN = r"a\x1b]0;title\x07\x1b[31mred\nerror: forged\r\t\x85\u2028\u202e\udcff"


def test_what_is_not_printable_is_written_as_in_python():
    assert escaped(EVIL) == SHOWN == escaped(SHOWN)
    assert (
        escaped("d\u00e9j\u00e0 \u65e5\u672c \U0001f600 C:\\n")
        == "d\u00e9j\u00e0 \u65e5\u672c \U0001f600 C:\\n"
    )
    assert escaped("a\nb\tc\x07", kept="\n\t") == "a\nb\tc\\x07"


def test_an_error_is_one_line_wherever_it_goes(capsys):
    error = UserError(f"--input: {EVIL} does not exist")
    assert str(error) == f"--input: {SHOWN} does not exist"
    assert str(UserError(f"{error}; mend it")) == f"{error}; mend it"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    handed_on = f"Caught in a worker:\nTraceback\n{UserError.__module__}.UserError: {error}\n"
    assert str(UserError(handed_on)) == str(error)
    with pytest.raises(SystemExit):
        exit_with(error)
    assert capsys.readouterr().err == f"error: --input: {SHOWN} does not exist\n"


def test_summaries_show_names_escaped():
    bad = str(UserError(f"{EVIL}:1: bad JSON"))
    data = PreprocessSummary(EVIL, "uint16", 1, 1, 1, 1, 0, 1, [bad], seconds=1.0)
    tokenizer = TokenizerSummary(EVIL, 1, 1, 1, 1, 1, 1, 0, 1.0)
    lines = str(data).splitlines()
    assert (
        len(lines) == 4
        and lines[0].startswith(f"{SHOWN}.bin")
        and lines[3] == f"  {SHOWN}:1: bad JSON"
    )
    assert str(tokenizer).startswith(f"{SHOWN}: 1 pieces") and str(tokenizer).isprintable()


@pytest.mark.parametrize("word", ["plain", "a b'c", EVIL, "\\ ' \" $HOME `x` \n3", "\udcff\udcfe7"])
def test_a_launch_line_is_printable_and_means_what_it_should(word):
    quoted = bash_quoted(word)
    assert quoted.isprintable()
    code = "import os, sys; sys.stdout.buffer.write(os.fsencode(sys.argv[1]))"
    command = f"{sys.executable} -c '{code}' {quoted}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert run.stdout == os.fsencode(word)
