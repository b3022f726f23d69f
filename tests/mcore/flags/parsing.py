"""Parses the flags of a test, which follow the common ones."""

import sys

from megatron.training.arguments import parse_args

from megatron_mdm.mcore.flags import arguments
from tests import ranks

FITTED = "--mdm-rate-sampler ppots --mdm-ppots-file x.json"
COMMON = [*ranks.MODEL, *ranks.TOKENIZER, *ranks.TRAINING]


def parsed(monkeypatch, *flags, world=1, data=("--mock-data",)):
    monkeypatch.setattr(sys, "argv", ["pretrain", *COMMON, *data, *flags])
    monkeypatch.setenv("WORLD_SIZE", str(world))
    return parse_args(arguments._quiet_parser)
