"""Entries that several test files launch: tools, logits, and the program without common flags."""

import argparse
import contextlib
import dataclasses
import os
import runpy
import sys
from pathlib import Path

import torch

from megatron_mdm.checkpoint import open_checkpoint
from megatron_mdm.pretrain import main
from tests import ROOT


def tool() -> None:
    """Runs a command-line tool. The arguments after `--` are its file and its flags.

    The tool's stdout goes to a file `stdout<rank>` beside the log.
    """
    file, *sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
    path = Path(os.environ["TRACE_DIR"], f"stdout{os.environ['RANK']}")
    with open(path, "w", encoding="utf-8") as stdout, contextlib.redirect_stdout(stdout):
        runpy.run_path(str(ROOT / file), run_name="__main__")


def tool_in_its_directory() -> None:
    """Runs `tool` in the directory of the run's log, to which paths in its flags are relative."""
    root = os.getcwd()
    os.chdir(os.environ["TRACE_DIR"])
    place = sys.argv.index("--") + 1
    sys.argv[place] = os.path.join(root, sys.argv[place])
    tool()


def only_these_flags() -> None:
    """Runs the program with only the flags after `--`."""
    sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
    main()


def logits() -> None:
    """Every rank saves the logits of a checkpoint on random rows of two lengths."""
    load, stages = sys.argv[sys.argv.index("--") + 1 :]
    with open_checkpoint(load, "cpu", int(stages)) as loaded:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(0, 127, shape, generator=generator) for shape in ((3, 32), (1, 7))]
        plain = [loaded.logits(tokens) for tokens in rows]
        args = argparse.Namespace(**{**vars(loaded.args), "mdm_shift": True})
        shifting = dataclasses.replace(loaded, args=args)
        shifted = [shifting.logits(tokens) for tokens in rows]
        torch.save((plain, shifted), f"{os.environ['TRACE_DIR']}/logits{os.environ['RANK']}.pt")
