"""The process and its environment, before torch and Megatron are imported."""

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_mdm.errors import UserError

# Variables that torchrun sets, with the values for a run of a single process.
ALONE = {
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
}
# Variables in which srun and mpirun give the number of processes that they have started.
STARTED_TOGETHER = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
M_MMAP_THRESHOLD = -3  # from malloc.h
OWN_MAPPING_BYTES = 4 << 20


def prepare_environment(device: str) -> None:
    """Sets environment variables that must be set before torch and megatron are imported.

    For the device `cpu` it also disables torch.compile and the imports of CUDA libraries.
    """
    # Megatron requires 1 to overlap communication under tensor or context parallelism.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if device == "cpu":
        # Megatron decorates functions with torch.compile when it is imported. On the CPU the first
        # call would compile for minutes, and rounding would differ between layouts.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        # On a machine with a GPU, Megatron would use the CUDA optimizers and norms of these.
        for library in ("transformer_engine", "apex", "amp_C"):
            sys.modules[library] = None  # type: ignore[assignment]  # makes its import fail


def return_freed_memory() -> None:
    """Makes glibc return large tensors of the CPU to the system when they are freed.

    glibc gives each block above a threshold its own memory mapping and keeps smaller blocks in its
    heap. By default it raises this threshold, up to 32 MiB. PyTorch requests aligned blocks, which
    seldom fit into the hole that a block of the same size has left. The heap then fragments and
    grows with every call of a model. This function fixes the threshold at OWN_MAPPING_BYTES. It
    costs time (a fifth of a fit to a small model), because the system clears new mappings. Without
    glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, OWN_MAPPING_BYTES)


def join_ranks() -> None:
    """Sets torchrun's variables for a run of one rank, if no launcher has started this process.

    Raises:
        UserError: this process is one of several, but its rank or the address of the others is not
            set.
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


@contextmanager
def silent_import() -> Iterator[None]:
    """Hides warnings of Megatron and torch during import about kernels that are not used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
