"""What the fork server of runs.py imports, once for all runs on the CPU: as the program does."""

from megatron_mdm.environment import prepare_environment

prepare_environment("cpu")

from megatron_mdm.mcore.device import training_device  # noqa: E402

with training_device("cpu"):
    # Tokenizers come with Hugging Face's libraries, which take a second.
    import megatron.core.tokenizers.text  # noqa: F401

    import megatron_mdm.mcore.inference.loaded_model
    import megatron_mdm.mcore.pretrain  # noqa: F401
