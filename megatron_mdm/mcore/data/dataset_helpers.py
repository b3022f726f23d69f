"""Megatron's compiled helpers of datasets, as its wheel ships them."""

from megatron.core.datasets import utils as dataset_utils


def use_shipped_dataset_helpers() -> None:
    """Makes Megatron use the compiled helpers in its wheel.

    Megatron would first call make, find no Makefile in the wheel, and exit.
    """
    import megatron.core.datasets.helpers_cpp  # noqa: F401  (fails here, in one line, if missing)

    dataset_utils.compile_helpers = lambda: None
