"""Checks whether the flags of a run fit its number of nodes.

    python -m megatron_mdm.sizing.nodes 2 8 --global-batch-size 512 --micro-batch-size 4

If they do not, the program ends with status 2 and one line, which names the numbers of nodes that
fit. It imports neither torch nor Megatron, so that a launcher can ask before it starts anything.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NoReturn

from megatron_mdm.errors import UserError, run_tool


@dataclass(frozen=True)
class Layout:
    """The flags that define how a run is divided among its ranks, with Megatron's names."""

    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    eval_global_batch_size: int | None = None
    eval_micro_batch_size: int | None = None
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None

    @classmethod
    def from_flags(cls, flags: Sequence[str]) -> "Layout":
        """Reads the sizes from a run's flags; the last flag of a name counts.

        Raises:
            UserError: a size is not a whole number of at least 1.
        """
        parser = _Parser(add_help=False, allow_abbrev=False)
        for field in fields(cls):
            name = f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, type=_size, default=field.default)
        return cls(**vars(parser.parse_known_args(list(flags))[0]))

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Layout":
        """Reads the sizes from Megatron's arguments."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    def fits(self, ranks: int) -> bool:
        """Whether `ranks` ranks can share model, experts and batch, by Megatron's rules."""
        if ranks % self.replica or ranks % self.expert_replica:
            return False
        replicas = ranks // self.replica
        return all(rows % (micro * replicas) == 0 for rows, micro in self._batches())

    def nodes(self, gpus: int) -> list[int]:
        """Numbers of nodes with `gpus` GPUs each that fit; empty if no batch size is given."""
        replicas = min((rows // micro for rows, micro in self._batches()), default=0)
        most = replicas * self.replica // gpus
        return [nodes for nodes in range(1, most + 1) if self.fits(nodes * gpus)]

    def __str__(self) -> str:
        """The flags that differ from their defaults."""
        flags = [
            (f"--{f.name.replace('_', '-')}", getattr(self, f.name), f.default)
            for f in fields(self)
        ]
        return ", ".join(f"{flag} {value}" for flag, value, default in flags if value != default)

    @property
    def replica(self) -> int:
        """Number of ranks that share one replica of the model."""
        ranks = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return ranks * self.context_parallel_size

    @property
    def expert_replica(self) -> int:
        """Number of ranks that share one replica of the experts."""
        tensor = self.expert_tensor_parallel_size or self.tensor_model_parallel_size
        return tensor * self.expert_model_parallel_size * self.pipeline_model_parallel_size

    def _batches(self) -> Iterator[tuple[int, int]]:
        """(rows of a global batch, rows of a micro-batch), for training, then for validation."""
        rows, micro = self.global_batch_size, self.micro_batch_size
        if rows is not None and micro is not None:
            yield rows, micro
            yield self.eval_global_batch_size or rows, self.eval_micro_batch_size or micro


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _size(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def check_nodes(layout: Layout, nodes: int, gpus: int) -> None:
    """Checks that a run fits `nodes` nodes with `gpus` GPUs each.

    Raises:
        UserError: it does not fit; the message names the numbers of nodes that fit.
    """
    if layout.fits(nodes * gpus):
        return
    fitting = [str(number) for number in layout.nodes(gpus)]
    *others, last = fitting or ["another number of GPUs a node"]
    numbers = f"{', '.join(others)} or {last}" if others else last
    unit = "" if not fitting else " node" if fitting == ["1"] else " nodes"
    raise UserError(
        f"{nodes} {'node' if nodes == 1 else 'nodes'} of {gpus} GPUs cannot share the run evenly "
        f"({layout}): take {numbers}{unit}, or change these flags"
    )


def main() -> None:
    """Checks the words of the command line."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", type=_size, metavar="NODES", help="number of nodes")
    parser.add_argument("gpus", type=_size, metavar="GPUS", help="number of GPUs of a node")
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="FLAGS", help="all flags of the run"
    )
    options = parser.parse_args()
    check_nodes(Layout.from_flags(options.flags), options.nodes, options.gpus)


if __name__ == "__main__":
    run_tool(main)
