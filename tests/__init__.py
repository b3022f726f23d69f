"""Tests, and what their processes import first.

Megatron binds what it finds while it is imported, Transformer Engine's optimizers and kernels too,
which need a GPU. What computes on the CPU, pytest's own process and most ranks, hides them before,
as `megatron_mdm.pretrain` does. The fork server of the ranks hides the GPU as well, since forks of
a process that has looked for one cannot turn to it.

Ranks and tools that may use a GPU run as users do, with torch.compile, which is switched off here:
`ranks.users_environment`.
"""

import os
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
HAS_TRANSFORMER_ENGINE = find_spec("transformer_engine") is not None

# What was said before; workers of pytest-xdist inherit what their parent has switched off.
os.environ.setdefault("MDM_TEST_COMPILE_DISABLE", os.environ.get("TORCH_COMPILE_DISABLE", ""))
if os.environ.get("MDM_TEST_RANKS") != "with Transformer Engine":  # set by ranks.launch
    from megatron_mdm.environment import prepare_environment

    prepare_environment("cpu")
if os.environ.get("MDM_TEST_RANKS") == "on the CPU":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
