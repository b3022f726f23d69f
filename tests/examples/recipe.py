"""An entry that reads an example's flags as its ranks would, without training."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.device import training_device
from megatron_mdm.mcore.flags.layout_checks import check_sizes


def fits(args: Namespace, nodes: int) -> bool:
    """Whether every rank would accept the flags on this number of nodes of 8 GPUs."""
    os.environ["WORLD_SIZE"] = str(8 * nodes)
    try:
        check_sizes(args)
    except UserError:
        return False
    return True


def recipe() -> None:
    """Saves sizes, memory and possible nodes of the flags after `--`, as the first of 8 ranks."""
    from megatron_mdm.environment import prepare_environment
    from megatron_mdm.mcore.flags.arguments import parse
    from megatron_mdm.mcore.model.builder import model_config
    from megatron_mdm.sizing.flops import ModelShape
    from megatron_mdm.sizing.memory import expected_bytes

    sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
    os.environ["WORLD_SIZE"] = "8"
    prepare_environment("cpu")
    with training_device("cpu"):
        args = parse()
        model_config(args, MDMConfig.from_args(args))  # checks the layers against the layout
    found = {"shape": vars(ModelShape.from_args(args)), "bytes": expected_bytes(args)}
    found["rotary_base"] = args.rotary_base
    found["nodes"] = [nodes for nodes in range(1, 2 * args.global_batch_size) if fits(args, nodes)]
    Path(os.environ["TRACE_DIR"], "recipe.json").write_text(json.dumps(found))
