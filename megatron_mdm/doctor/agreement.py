"""Whether the ranks of a launch agree: facts of all ranks, and where they differ."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

from megatron_mdm.doctor.facts import SHOWN, Facts
from megatron_mdm.errors import UserError

# Differences that are reported, and in which ranks may differ: a node may name its interfaces and
# its GPUs otherwise, and the driver and the kernel of a cluster are renewed node by node.
MAY_DIFFER = {
    *("driver", "Linux", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG"),
    *("NCCL_DEBUG_FILE", "NCCL_HOSTID", "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "NVSHMEM_HCA_LIST"),
    *("CUDA_CACHE_PATH", "OMP_NUM_THREADS", "UCX_NET_DEVICES"),
}
MOST_NODES = 8  # that a line names
NOT_SET, HIDDEN = "not set", "a value that is not printed"


def number_of_ranks() -> int:
    """The number of ranks that a launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def gather(facts: Facts, seconds: int) -> list[Facts] | None:
    """Facts of all ranks, over gloo.

    Args:
        facts: of this rank.
        seconds: how long a rank waits for the others.

    Returns:
        Facts by rank on rank 0; None on the other ranks.

    Raises:
        UserError: a rank does not answer, or cannot be reached.
    """
    import torch.distributed as dist

    rank, ranks = int(os.environ["RANK"]), number_of_ranks()
    found: list[Facts] | None = [facts] * ranks if rank == 0 else None
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
        dist.gather_object(facts, found)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"rank {rank} on {facts.host} did not meet all {ranks} ranks over gloo in {seconds} s "
            f"({reason}): see the output of the other nodes, and set GLOO_SOCKET_IFNAME to an "
            "interface by which the nodes reach each other"
        ) from error
    return found


def share_status(status: int) -> int:
    """The exit status of rank 0, on every rank, after which the ranks are no longer connected."""
    import torch
    import torch.distributed as dist

    shared = torch.tensor(status)
    dist.broadcast(shared, 0)
    dist.barrier()
    dist.destroy_process_group()
    return int(shared)


@dataclass(frozen=True)
class Difference:
    """Something in which ranks differ."""

    what: str
    values: list[tuple[str, list[int]]]
    """Each value with its ranks; the most frequent value is the first."""

    is_fault: bool
    """Whether the ranks of a launch must agree in it."""

    def in_words(self, ranks: Sequence[Facts]) -> str:
        """One line that names the values, and the nodes and ranks of each."""
        return f"{self.what}: " + "; ".join(
            f"{value} on {_places(places, ranks)}" for value, places in self.values
        )


def differences(ranks: Sequence[Facts]) -> list[Difference]:
    """The differences between ranks.

    Args:
        ranks: facts by rank.
    """
    flat = [dict(_flat(facts)) for facts in ranks]
    variables = {name for facts in ranks for name in facts.environment}
    found = []
    for what in dict.fromkeys(name for facts in flat for name in facts):
        places: dict[str, list[int]] = defaultdict(list)
        for rank, facts in enumerate(flat):
            places[facts.get(what, NOT_SET)].append(rank)
        if len(places) == 1:
            continue
        values = sorted(places.items(), key=lambda item: -len(item[1]))
        if what in variables - set(SHOWN):
            values = [(value if value == NOT_SET else HIDDEN, of) for value, of in values]
        found.append(Difference(what, values, what not in MAY_DIFFER))
    return found


def _flat(facts: Facts) -> Iterator[tuple[str, str]]:
    """What is compared, as text, by the name that the report prints."""
    for name, version in facts.versions.items():
        yield name, version or "not installed"
    yield "GPUs", gpus_in_words(facts)
    yield "libraries", ", ".join(sorted(facts.libraries)) or "none"
    for name, problem in facts.problems.items():
        yield f"problem with {name}", problem
    yield from facts.environment.items()


def gpus_in_words(facts: Facts) -> str:
    """The GPUs of a rank in one line."""
    kinds = [
        f"{len(list(same))} x {gpu.name}, {gpu.memory_gib} GiB, compute capability "
        f"{gpu.capability[0]}.{gpu.capability[1]}"
        for gpu, same in groupby(facts.gpus)
    ]
    return "; ".join(kinds) or "none"


def _places(places: Sequence[int], ranks: Sequence[Facts]) -> str:
    """Nodes and ranks, such as `node3 (ranks 24-31)`."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank in places:
        by_host[ranks[rank].host].append(rank)
    if len(by_host) > MOST_NODES:
        return f"{len(by_host)} nodes ({len(places)} ranks)"
    return ", ".join(f"{host} ({_intervals(numbers)})" for host, numbers in by_host.items())


def _intervals(numbers: Sequence[int]) -> str:
    runs = [
        [number for _, number in same]
        for _, same in groupby(enumerate(numbers), lambda item: item[1] - item[0])
    ]
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"
