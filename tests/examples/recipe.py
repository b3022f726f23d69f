"""An entry that reads the flags of an example as its ranks would, without training."""

import json
import os
import sys
from pathlib import Path

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.device import training_device


def recipe() -> None:
    """Sizes and expected memory of the flags after `--` on 8 ranks, of which this is the first."""
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
    Path(os.environ["TRACE_DIR"], "recipe.json").write_text(json.dumps(found))
