"""Tests, and what their ranks import first.

Megatron binds what it finds while it is imported, Transformer Engine's optimizers and kernels too,
which need a GPU: a rank on the CPU hides them before, as `megatron_mdm.pretrain` does. It hides the
GPU as well, since forks of a process that has looked for one cannot turn to it.
"""

import os

if os.environ.get("MDM_TEST_RANKS") == "cpu":  # set by ranks.launch
    from megatron_mdm.pretrain import prepare_environment

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    prepare_environment("cpu")
