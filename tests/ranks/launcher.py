"""Starts the ranks of a run in forks of a warm process, and reads the results that they leave.

The ranks of a run meet at a store that `launch` holds, just as they meet at torchrun's store. The
store listens on a port that the system chose, so no other process can take the port before the
ranks use it.
"""

import gc
import os
import pkgutil
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.training import checkpointing, global_vars
from megatron.training.training import destroy_global_state
from torch.distributed import TCPStore

from tests.ranks import server
from tests.ranks.flags import MODEL, TOKENIZER, TRAINING
from tests.ranks.recording import train
from tests.ranks.tools import users_environment

TIMEOUT = 180  # seconds for a group with one run; a run takes about 5
TIMEOUT_OF_SEVERAL = 540  # seconds for a group with several runs
TAIL = 8000  # characters of output shown on failure: tracebacks pass through Megatron and torchrun

_stores: list[TCPStore] = []  # stores of `meet_again`, kept until the process ends


@dataclass
class Run:
    """The results that a finished run left."""

    status: list[int]
    output: list[str]
    scalars: dict[str, list[float]] = field(default_factory=dict)
    traces: list[dict] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return self.scalars["mdm loss"]

    @property
    def grad_norms(self) -> list[float]:
        return self.scalars["grad-norm"]

    def masks(self) -> dict:
        """(split, row) -> (t, masked tokens), merged over all ranks, which must agree."""
        merged: dict = {}
        for trace in self.traces:
            for key, value in trace.items():
                assert merged.setdefault(key, value) == value, f"ranks differ in row {key}"
        return merged


def assert_masks_equal_after_refits(found: dict, expected: dict) -> None:
    """Compares two results of `Run.masks`: tokens exactly, rates except for rounding.

    A refitted density follows losses or gradients, whose sums each layout and each processor rounds
    in its own way, so that its rates are not equal bit for bit.
    """
    assert {key: tokens for key, (_, tokens) in found.items()} == {
        key: tokens for key, (_, tokens) in expected.items()
    }
    for key, (t, _) in expected.items():
        assert found[key][0] == pytest.approx(t, rel=1e-6), key


def launch(
    directory: Path,
    ranks: int,
    *flags: str,
    entry: Callable[[], None] = train,
    check: bool = True,
    drop: Iterable[str] = (),
    transformer_engine: bool = False,
) -> Run:
    """Calls `entry` in `ranks` processes, with the common flags followed by `flags`.

    Args:
        directory: where logs and records go.
        ranks: number of processes.
        flags: as on the command line.
        entry: function of a module. A rank imports it by module and name, as pickle does. It reads
            the flags from `sys.argv`, its rank from RANK and `directory` from TRACE_DIR.
        check: fail unless every rank ends with status 0.
        drop: common flags to leave out, together with their values.
        transformer_engine: start the ranks as new processes, in which Transformer Engine is used if
            it is installed. They can also use CUDA, which a forked process may not be able to.
    """
    argv, store = _argv(directory, flags, drop), _store()
    start = server.context(transformer_engine)
    processes = [
        start.Process(
            target=_rank, args=(_name(entry), argv, rank, ranks, store.port, str(directory))
        )
        for rank in range(ranks)
    ]
    environment = users_environment() if transformer_engine else dict(os.environ)
    with mock.patch.dict(os.environ, environment, clear=True):
        for process in processes:
            process.start()
    _wait(processes, TIMEOUT)
    return _left_by(processes, directory, check)


def launch_all(
    directory: Path,
    ranks: int,
    runs: Mapping[str, Sequence[str]],
    *,
    entry: Callable[[], None] = train,
    drop: Iterable[str] = (),
) -> dict[str, Run]:
    """Runs several configurations one after the other in one group of ranks, and checks each.

    Each run is like a run of `launch`; the processes forget Megatron's state of the run before it.
    A failure ends all runs that would follow.

    Args:
        directory: each run gets a subdirectory of it.
        ranks: number of processes.
        runs: run name -> flags. The name must be a valid file name.
        entry: function of a module. It must undo all replacements of functions that it makes.
        drop: common flags to leave out of all runs, together with their values.

    Returns:
        run name -> the results of the run.
    """
    stores = [_store() for _ in runs]
    jobs = [
        (_name(entry), _argv(directory / name, flags, drop), store.port, str(directory / name))
        for (name, flags), store in zip(runs.items(), stores, strict=True)
    ]
    start = server.context()
    processes = [
        start.Process(target=_rank_of_all, args=(jobs, rank, ranks)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    _wait(processes, TIMEOUT_OF_SEVERAL)
    begun = [name for name in runs if (directory / name / "rank0.log").exists()]
    _left_by(processes, directory / begun[-1], check=True)  # the run that failed, if one did
    return {name: _left_by(processes, directory / name, check=True) for name in runs}


def launch_layouts(
    directory: Path,
    runs: Mapping[str, tuple[int, Sequence[str]]],
    *,
    entry: Callable[[], None] = train,
    drop: Iterable[str] = (),
) -> dict[str, Run]:
    """`launch_all` for runs with different numbers of ranks, in one group for each number.

    Args:
        directory: each run gets a subdirectory of it.
        runs: run name -> (number of processes, flags). The name must be a valid file name.
        entry: as of `launch_all`.
        drop: as of `launch_all`.

    Returns:
        run name -> the results of the run, in the order of `runs`.
    """
    found: dict[str, Run] = {}
    for count in {count: None for count, _ in runs.values()}:
        alike = {name: flags for name, (its, flags) in runs.items() if its == count}
        found |= launch_all(directory, count, alike, entry=entry, drop=drop)
    return {name: found[name] for name in runs}


def forget_megatron() -> None:
    """Resets Megatron's global state after a run, so that this process can begin another run."""
    writer = global_vars.get_tensorboard_writer()
    if writer is not None:
        writer.close()
    destroy_global_state()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    set_moe_metrics_tracker(None)
    checkpointing._CHECKPOINT_VERSION = None
    checkpointing.set_loaded_iteration(None)
    CachedMetadataFileSystemReader.clear_metadata_cache()
    gc.collect()


def _argv(directory: Path, flags: Sequence[str], drop: Iterable[str]) -> list[str]:
    directory.mkdir(parents=True, exist_ok=True)
    argv = [*MODEL, *TOKENIZER, *TRAINING, "--tensorboard-dir", str(directory / "tb")]
    for flag in drop:
        first = last = argv.index(flag)
        while last + 1 < len(argv) and not argv[last + 1].startswith("--"):
            last += 1
        del argv[first : last + 1]
    return [*argv, *flags]


def _store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _name(entry: Callable[[], None]) -> str:
    return f"{entry.__module__}:{entry.__qualname__}"


def _wait(processes: Sequence[BaseProcess], seconds: float) -> None:
    """Waits until all processes have ended. If one fails, it stops the others, as torchrun does."""
    deadline = time.monotonic() + seconds
    while any(p.is_alive() for p in processes):
        failed = any(p.exitcode not in (None, 0) for p in processes)
        if failed or time.monotonic() > deadline:
            time.sleep(1.0)
            for process in processes:
                process.terminate()
            end = time.monotonic() + 30.0
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
                process.kill()
            break
        time.sleep(0.02)
    for process in processes:
        process.join()


def _left_by(processes: Sequence[BaseProcess], directory: Path, check: bool) -> Run:
    """Reads the results that processes, which have ended, left in the directory of their run."""
    output = [(directory / f"rank{rank}.log").read_text() for rank in range(len(processes))]
    run = Run([p.exitcode for p in processes], output)
    if check:
        assert run.status == [0] * len(processes), "\n".join(text[-TAIL:] for text in output)
        run.scalars = read_scalars(directory / "tb") if (directory / "tb").exists() else {}
        run.traces = [torch.load(path) for path in sorted(directory.glob("trace*.pt"))]
    return run


def _rank_of_all(jobs: list[tuple[str, list[str], int, str]], rank: int, ranks: int) -> None:
    environment = dict(os.environ)
    for entry, argv, port, directory in jobs:
        _rank(entry, argv, rank, ranks, port, directory)
        forget_megatron()
        os.environ.clear()  # removes variables that Megatron set for a model
        os.environ.update(environment)


def _rank(name: str, argv: list[str], rank: int, ranks: int, port: int, directory: str) -> None:
    log = os.open(f"{directory}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TRACE_DIR": directory,
    }
    sys.argv = ["pretrain", *argv]
    pkgutil.resolve_name(name)()
    sys.stdout.flush()


def meet_again() -> None:
    """Lets the ranks of a run form a process group again after they destroyed their first one.

    Every rank calls it. The ranks meet at a new store that the first rank holds, because the old
    store keeps the addresses of the old group.
    """
    host = os.environ["MASTER_ADDR"]
    old = TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False)
    if os.environ["RANK"] == "0":
        _stores.append(TCPStore(host, 0, is_master=True, wait_for_workers=False))
        old.set("next store", str(_stores[-1].port))
    os.environ["MASTER_PORT"] = old.get("next store").decode()


def read_scalars(directory: Path) -> dict[str, list[float]]:
    """TensorBoard's scalars, float32, per tag and in the order of iterations."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint, each whole, whatever layout saved the checkpoint.

    The tensors of a HybridModel get GPTModel's names and shapes.
    """
    iteration = (checkpoint / "latest_checkpointed_iteration.txt").read_text().strip()
    reader = dcp.FileSystemReader(checkpoint / f"iter_{int(iteration):07d}")
    state = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in reader.read_metadata().state_dict_metadata.items()
        if hasattr(item, "size") and not key.startswith(("optimizer", "rng", "mdm_log_state"))
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return _as_gpt_model(state) if "decoder.final_norm.weight" in state else state


def _as_gpt_model(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacks the tensors of the layers, which a HybridModel stores by the number of the layer."""
    layers: dict[str, dict[int, torch.Tensor]] = {}
    found = {}
    for key, tensor in state.items():
        part = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", key)
        if part:
            layers.setdefault(f"decoder.layers.{part[2]}", {})[int(part[1])] = tensor
        else:
            found[key.replace("final_norm", "final_layernorm")] = tensor
    return found | {
        key: torch.stack([tensors[n] for n in sorted(tensors)]) for key, tensors in layers.items()
    }


def the_error_line(output: Iterable[str]) -> str:
    """The only error line of these logs. Fails if there is another one or a traceback."""
    text = "".join(output)
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text[-3000:]
    assert "Traceback" not in text and "Exception ignored" not in text, text[-3000:]
    return lines[0]
