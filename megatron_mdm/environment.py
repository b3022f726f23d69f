"""The process and its environment, before torch and Megatron are imported."""

import ctypes
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from megatron_mdm.errors import UserError

MEGATRON_VERSIONS = ((0, 19, 2), (0, 20))
# What torchrun sets, and the values for a process that nobody else belongs to.
ALONE = {
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
}
# Where srun and mpirun say how many processes they have started.
STARTED_TOGETHER = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
M_MMAP_THRESHOLD = -3  # of malloc.h
OWN_MAPPING_BYTES = 4 << 20


def prepare_environment(device: str) -> None:
    """Sets what must stand in the environment before torch and megatron are imported."""
    # Megatron requires it for overlapping communication with tensor or context parallelism.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if device == "cpu":
        # Megatron decorates functions with torch.compile while it is imported; on the CPU that
        # would compile for minutes at the first call, and round differently between layouts.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        # On a machine with a GPU Megatron would take these libraries' CUDA optimizers and norms.
        for library in ("transformer_engine", "apex", "amp_C"):
            sys.modules[library] = None  # type: ignore[assignment]  # makes its import fail


def return_freed_memory() -> None:
    """Makes glibc return large tensors of the CPU to the system when they are freed.

    It raises the size from which a block gets a mapping of its own, up to 32 MiB, and keeps smaller
    ones in its heap. PyTorch asks for aligned blocks, which seldom fit into a hole that an equally
    large one has left, so that the heap grows with every call of a model. Here the size is fixed.
    This costs time (a fifth of a fit to a small model), since the system clears what it hands out.
    Without glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, OWN_MAPPING_BYTES)


def join_ranks() -> None:
    """Makes a run of one rank of a process that no launcher has started.

    Raises:
        UserError: it is one of several, and does not know which one or where the others are.
    """
    missing = [name for name in ALONE if name not in os.environ]
    if not missing:
        return
    for name in ("WORLD_SIZE", *([] if "WORLD_SIZE" in os.environ else STARTED_TOGETHER)):
        if os.environ.get(name, "1") != "1":
            raise UserError(
                f"{name} is {os.environ[name]}, and {missing[0]} is not set: start the ranks with "
                "torchrun --nproc-per-node N -m megatron_mdm.pretrain, which sets it"
            )
    os.environ.update({name: ALONE[name] for name in missing})


def check_megatron_version() -> None:
    """Checks the installed megatron-core.

    Raises:
        UserError: it is missing, or of a version whose hooks differ.
    """
    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        raise UserError(
            "megatron-core is not installed: pip install megatron-core==0.19.2"
        ) from None
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:3])
    least, below = MEGATRON_VERSIONS
    if not least <= numbers < below:
        raise UserError(
            f"megatron-core {installed} is not supported: pip install 'megatron-core>=0.19.2,<0.20'"
        )


@contextmanager
def silent_import() -> Iterator[None]:
    """Keeps back what Megatron and torch say on import about kernels that are not used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
