"""Time and peak memory of output layer and cross entropy: at all positions against masked ones.

Both sides run the head that training runs, Megatron's output layer and its cross entropy, forward
and backward, on one rank: on CUDA in bfloat16 if there is a GPU, else on the CPU in float32. Masks
are those of training with exact counts and lattice rates, new ones in each repeat, the same for
both sides, which alternate. On the CPU, time is that of the processor, which other work on the
machine disturbs less than the clock's. Peak memory is what a repeat takes beyond weights and hidden
states, the gradient of the weights included, as torch's allocator says on CUDA, and on the CPU
Linux of the process.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.timing import device_name, measured
from megatron_mdm.environment import silent_import
from megatron_mdm.errors import UserError, check_numbers
from megatron_mdm.files import write_json

if TYPE_CHECKING:
    import torch

DESCRIPTION = "time and memory of the head at masked positions against all"
# A small one, LLaDA's, and that of Dream (and Qwen2.5).
VOCABULARIES = (32_000, 126_464, 152_064)
SIZES = {"cpu": {"rows": 8, "length": 64, "hidden": 256}}
SIZES["cuda"] = {"rows": 4, "length": 1024, "hidden": 4096}
SIDES = ("full", "masked")
SEED = 1234


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    for name, text in (("rows", "in a micro-batch"), ("length", "of a row"), ("hidden", "size")):
        default = ", ".join(f"{sizes[name]} on {device}" for device, sizes in SIZES.items())
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--vocabularies",
        type=int,
        nargs="+",
        default=list(VOCABULARIES),
        metavar="N",
        help=f"sizes (default: {' '.join(map(str, VOCABULARIES))})",
    )


def run(args: argparse.Namespace) -> None:
    """Measures, prints a table, and writes `args.json` if it is set.

    Raises:
        UserError: a size below 1.
    """
    import torch

    check_numbers(args, *SIZES["cpu"], "repeats")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {name: getattr(args, name) for name in SIZES[device]}
    sizes = {n: SIZES[device][n] if value is None else value for n, value in sizes.items()}
    if min(args.vocabularies) < 1:
        raise UserError(f"--vocabularies {min(args.vocabularies)}: must be at least 1")
    results = {
        "benchmark": "head",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **sizes,
        "repeats": args.repeats,
        "vocabularies": [
            measure(size, device=device, repeats=args.repeats, **sizes)
            for size in args.vocabularies
        ],
    }
    print(_table(results))
    if args.json:
        write_json(args.json, results)


def measure(
    vocabulary: int, rows: int, length: int, hidden: int, repeats: int, device: str
) -> dict[str, Any]:
    """Times and peaks of both heads at one vocabulary size.

    Returns:
        For `full` and `masked` the median seconds and peak bytes (None where the system does not
        say) of a repeat; the medians over repeats of masked / full of both; the masked fraction.
    """
    import torch

    with silent_import():
        from megatron_mdm.mcore.model.masked_head import HeadContext, MaskedPositions, head

    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, list[int | None]] = {side: [] for side in SIDES}
    fractions = []
    with one_rank(device):
        layer, cross_entropy = _output_layer(vocabulary, hidden, device)
        generator = torch.Generator().manual_seed(SEED)
        states = torch.randn(length, rows, hidden, generator=generator)
        states = states.to(device, layer.weight.dtype).requires_grad_()
        labels = torch.randint(vocabulary, (rows, length), generator=generator).to(device)

        def step(side: str, mask: torch.Tensor) -> None:
            positions = MaskedPositions(mask) if side == "masked" else None
            context = HeadContext(positions)
            losses = head(states, layer, None, labels, cross_entropy, _unscaled, None, context)
            # Not losses[mask], for whose size the host would wait.
            torch.where(mask, losses, 0.0).sum().backward()

        for repeat in range(repeats + 1):  # the first one warms up
            mask = _mask(rows, length, repeat, generator).to(device)
            for side in SIDES if repeat % 2 else SIDES[::-1]:
                layer.weight.grad = states.grad = None
                spent, peak = measured(partial(step, side, mask), device)
                if repeat:
                    seconds[side].append(spent)
                    peaks[side].append(peak)
            if repeat:
                fractions.append(mask.double().mean().item())
    has_peaks = None not in peaks["full"]
    return {
        "vocabulary": vocabulary,
        "masked_fraction": statistics.mean(fractions),
        **{
            side: {
                "seconds": statistics.median(seconds[side]),
                "peak_bytes": statistics.median(peaks[side]) if has_peaks else None,
            }
            for side in SIDES
        },
        "time_ratio": _median_ratio(seconds),
        "peak_ratio": _median_ratio(peaks) if has_peaks else None,
    }


def _unscaled(logits: "torch.Tensor") -> "torch.Tensor":
    return logits


def _median_ratio(values: dict[str, list]) -> float:
    pairs = zip(values["masked"], values["full"], strict=True)
    return statistics.median(masked / full for masked, full in pairs)


@contextlib.contextmanager
def one_rank(device: str) -> Iterator[None]:
    """Megatron's process groups over this process alone."""
    import torch

    with silent_import():
        from megatron.core import mpu

        from megatron_mdm.mcore.device import training_device

    with training_device(device):
        torch.distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=torch.distributed.HashStore(),
            rank=0,
            world_size=1,
        )
        try:
            mpu.initialize_model_parallel()
            yield
        finally:
            mpu.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def _output_layer(vocabulary: int, hidden: int, device: str) -> tuple[Any, Callable]:
    """Megatron's output layer, and its cross entropy as GPTModel calls it."""
    import torch
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy

    config = ModelParallelConfig(
        params_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        use_cpu_initialization=device == "cpu",
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    layer = ColumnParallelLinear(
        hidden, vocabulary, config=config, init_method=torch.nn.init.zeros_, bias=False
    )
    torch.manual_seed(SEED)
    torch.nn.init.normal_(layer.weight, std=0.02)

    def cross_entropy(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_cross_entropy(logits, labels.t().contiguous()).t().contiguous()

    return layer, cross_entropy


def _mask(rows: int, length: int, repeat: int, generator: "torch.Generator") -> "torch.Tensor":
    """Masks of the rows of one micro-batch, as training draws them."""
    import torch

    from megatron_mdm.objective.masks import exact_count_mask
    from megatron_mdm.objective.quantiles import Quantiles
    from megatron_mdm.objective.randomness import Split, to_unit

    quantiles = Quantiles("lattice", SEED, Split.TRAIN)
    numbers = range(repeat * rows, (repeat + 1) * rows)
    t = to_unit(torch.tensor([quantiles(number) for number in numbers]))
    u = torch.rand(rows, length, dtype=torch.float64, generator=generator)
    return exact_count_mask(u, torch.ones(rows, length, dtype=torch.bool), t)[0]


def _table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['rows']} rows of {results['length']} positions, hidden size "
        f"{results['hidden']}, {results['device']}, threads {results['threads']}",
        f"{'vocabulary':>10}{'masked':>9}{'full s':>10}{'masked s':>10}{'ratio':>7}"
        f"{'full MB':>10}{'masked MB':>11}{'ratio':>7}",
    ]
    for row in results["vocabularies"]:
        full, masked = row["full"], row["masked"]
        line = f"{row['vocabulary']:>10}{row['masked_fraction']:>9.1%}"
        line += f"{full['seconds']:>10.4f}{masked['seconds']:>10.4f}{row['time_ratio']:>7.2f}"
        if row["peak_ratio"] is None:
            line += f"{'-':>10}{'-':>11}{'-':>7}"
        else:
            line += f"{full['peak_bytes'] / 1e6:>10.0f}{masked['peak_bytes'] / 1e6:>11.0f}"
            line += f"{row['peak_ratio']:>7.2f}"
        lines.append(line)
    return "\n".join(lines)
