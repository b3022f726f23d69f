"""Modules that the fork server of runs.py imports once for all CPU runs, as the program does."""

from megatron_mdm.environment import prepare_environment

prepare_environment("cpu")

from megatron_mdm.mcore.device import training_device  # noqa: E402

with training_device("cpu"):
    # This imports Hugging Face's libraries, which takes a second.
    import megatron.core.tokenizers.text  # noqa: F401

    import megatron_mdm.mcore.inference.loaded_model
    import megatron_mdm.mcore.pretrain  # noqa: F401
