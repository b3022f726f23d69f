"""Real ranks for tests: the program itself, over gloo, in processes forked from a warm one.

A fork server imports torch and Megatron once (6 s); every rank of every run is then a fork of it,
with fresh Megatron globals, as torchrun would start it. It has no Transformer Engine: ranks that
want it start from nothing.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

from tests import ROOT

TIMEOUT = 180  # seconds; a run here takes about 5
# Characters of output that a failure shows: tracebacks of ranks go through Megatron and torchrun.
RANK_TAIL, TOOL_TAIL = 8000, 4000
# Two ranks on any free port, also where the machine's own name cannot be resolved.
TORCHRUN = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2".split()
VOCAB, MASK_ID, EOD_ID = 120, 127, 119

# Told to audit hooks, as subprocess.Popen is: see tests/tiers.py.
LAUNCH = "tests.ranks.launch"

# The tokenizers import transformers, which takes a second.
multiprocessing.set_forkserver_preload(["tests.driver", "megatron.core.tokenizers.text"])

MODEL = [
    *"--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32".split(),
    *"--max-position-embeddings 32 --normalization RMSNorm --swiglu --disable-bias-linear".split(),
    *"--position-embedding-type rope --attention-dropout 0 --hidden-dropout 0".split(),
    *"--untie-embeddings-and-output-weights".split(),
]
# 64 x 2 = 128: the same padded vocabulary, and so the same softmax, at tensor parallel 1 and 2.
TOKENIZER = [
    *f"--tokenizer-type NullTokenizer --vocab-size {VOCAB}".split(),
    *f"--null-tokenizer-eod-id {EOD_ID}".split(),
    *f"--mdm-mask-token-id {MASK_ID} --make-vocab-size-divisible-by 64".split(),
]
TRAINING = [
    *"--mdm-device cpu --micro-batch-size 2 --global-batch-size 8 --train-iters 5".split(),
    *"--lr 1e-2 --lr-decay-style constant --log-interval 1 --num-workers 0".split(),
    *"--eval-interval 1000 --eval-iters 0 --split 90,10,0".split(),
]


@dataclass
class Run:
    """What a finished run left behind."""

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
        """(split, row) -> (t, masked tokens) over all ranks; the ranks must agree."""
        merged: dict = {}
        for trace in self.traces:
            for key, value in trace.items():
                assert merged.setdefault(key, value) == value, f"ranks differ in row {key}"
        return merged


def launch(
    directory: Path,
    ranks: int,
    *flags: str,
    entry: str = "train",
    check: bool = True,
    drop: Iterable[str] = (),
    transformer_engine: bool = False,
) -> Run:
    """Runs `tests.driver.<entry>` on `ranks` processes with these flags after the common ones.

    Args:
        directory: where its logs and records go.
        ranks: number of processes.
        flags: as on the command line.
        entry: function of tests/driver.py.
        check: fail unless every rank ends with status 0.
        drop: common flags to leave out, with their value.
        transformer_engine: let them have it if it is installed, and CUDA, which a process that was
            forked may not be able to use.
    """
    sys.audit(LAUNCH, str(directory))
    directory.mkdir(parents=True, exist_ok=True)
    argv = [*MODEL, *TOKENIZER, *TRAINING, "--tensorboard-dir", str(directory / "tb")]
    for name in drop:
        i = argv.index(name)
        del argv[i : i + 2]
    argv += flags
    port = _free_port()
    context = multiprocessing.get_context("spawn" if transformer_engine else "forkserver")
    # For tests/__init__.py, in the processes that this starts.
    os.environ["MDM_TEST_RANKS"] = "with Transformer Engine" if transformer_engine else "on the CPU"
    processes = [
        context.Process(target=_rank, args=(entry, argv, rank, ranks, port, str(directory)))
        for rank in range(ranks)
    ]
    environment = users_environment() if transformer_engine else dict(os.environ)
    with mock.patch.dict(os.environ, environment, clear=True):
        for process in processes:
            process.start()
    # As torchrun does: when one rank fails, the others are stopped.
    deadline = time.monotonic() + TIMEOUT
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
    output = [(directory / f"rank{rank}.log").read_text() for rank in range(ranks)]
    run = Run([p.exitcode for p in processes], output)
    if check:
        assert run.status == [0] * ranks, "\n".join(text[-RANK_TAIL:] for text in output)
        run.scalars = read_scalars(directory / "tb") if (directory / "tb").exists() else {}
        run.traces = [torch.load(path) for path in sorted(directory.glob("trace*.pt"))]
    return run


def _rank(entry: str, argv: list[str], rank: int, ranks: int, port: int, directory: str) -> None:
    log = os.open(f"{directory}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TRACE_DIR": directory,
    }
    sys.argv = ["pretrain", *argv]
    from tests import driver

    getattr(driver, entry)()
    sys.stdout.flush()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def users_environment() -> dict[str, str]:
    """The environment in which the tests were started, where torch.compile is not switched off."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_COMPILE_DISABLE"}
    given = environment.get("MDM_TEST_COMPILE_DISABLE")
    return environment | ({"TORCH_COMPILE_DISABLE": given} if given else {})


def tool(name: str, *flags: str) -> str:
    """What one of tools/ prints, started as users do, on one rank."""
    result = subprocess.run(
        [sys.executable, f"tools/{name}.py", *flags],
        cwd=ROOT,
        env=users_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-TOOL_TAIL:]
    return result.stdout


def fit_ppots(load: str | Path, output: Path, *flags: str) -> str:
    """What tools/fit_ppots.py prints about its fit to a checkpoint, which it writes to `output`."""
    where = ["--device", "cpu", "--load", str(load), "--output", str(output)]
    return tool("fit_ppots", *where, *flags)


def read_scalars(directory: Path) -> dict[str, list[float]]:
    """TensorBoard's scalars, float32, in the order of iterations."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's whole tensors of a checkpoint, whatever layout wrote it."""
    iteration = (checkpoint / "latest_checkpointed_iteration.txt").read_text().strip()
    reader = dcp.FileSystemReader(checkpoint / f"iter_{int(iteration):07d}")
    state = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in reader.read_metadata().state_dict_metadata.items()
        if hasattr(item, "size") and not key.startswith(("optimizer", "rng", "mdm_log_state"))
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def write_documents(prefix: Path, documents: list[list[int]]) -> None:
    """A .bin/.idx pair of these documents."""
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.int32)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(get_idx_path(str(prefix)))


def write_pairs(prefix: Path, pairs: list[tuple[list[int], list[int]]]) -> None:
    """A .bin/.idx pair of prompts and responses, as tools/preprocess_data.py writes them."""
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.int32)
    for prompt, response in pairs:
        builder.add_document([*prompt, *response], [len(prompt), len(response)])
    builder.finalize(get_idx_path(str(prefix)))


def random_pairs(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Prompts of tokens below 50, and responses of others with an end of document."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prompt = rng.integers(3, 50, size=rng.integers(0, 14)).tolist()
        response = rng.integers(50, 100, size=rng.integers(1, 16)).tolist()
        pairs.append((prompt, [*response, EOD_ID]))
    return pairs


def random_documents(count: int, seed: int = 0) -> list[list[int]]:
    """Documents of 5 to 60 tokens that a model can learn from, each with its end of document."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        start, step, length = rng.integers(3, 100), rng.integers(1, 4), rng.integers(4, 60)
        documents.append([*((start + step * np.arange(length)) % 100 + 3).tolist(), EOD_ID])
    return documents
