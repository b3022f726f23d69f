"""Measures preprocessing throughput: the package's worker processes against a plain loop.

The text is Python's standard library, which every machine has. Both sides tokenize the same JSONL
file with the same sentencepiece model into a Megatron dataset. The loop runs in one process and
only uses `json`, sentencepiece and Megatron's builder. The times include the start of the workers,
but not the import of Megatron. The two sides alternate, so that other load on the machine affects
both.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable

from megatron_mdm.data.load_tokenizer import load_sentencepiece
from megatron_mdm.data.preprocess import default_workers, preprocess
from megatron_mdm.data.tokenizer import train_tokenizer
from megatron_mdm.environment import silent_import
from megatron_mdm.errors import UserError, check_numbers
from megatron_mdm.files import write_json

DESCRIPTION = "preprocessing throughput: worker processes against a plain loop"
REPEATS = 3
_TRAINING_BYTES = 10_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--mb",
        type=float,
        default=30.0,
        metavar="N",
        help="text to tokenize, in MB, at least 1; above the size of the standard library (about "
        "30 MB) its files repeat (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=default_workers(),
        metavar="N",
        help="worker processes (default: the number of available CPUs, here %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Measures, prints a table, and writes the file `args.json` if it is given.

    Raises:
        UserError: a size is not possible.
    """
    check_numbers(args, "mb")
    results = measure(args.mb, args.workers)
    print(_table(results))
    if args.json:
        write_json(args.json, results)


def measure(megabytes: float, workers: int) -> dict:
    """Returns times in seconds, throughputs in MB/s (1e6 bytes of text), and their ratio.

    `spread` is (largest - smallest) / median of the times.

    Raises:
        UserError: There is no text to measure with.
    """
    import sentencepiece

    with silent_import():  # here, so that neither side's time includes the import
        import megatron.core.datasets.indexed_dataset  # noqa: F401

    with tempfile.TemporaryDirectory() as directory:
        base = pathlib.Path(directory)
        corpus, model = str(base / "corpus.jsonl"), str(base / "tokenizer.model")
        text_bytes = _write_corpus(corpus, int(megabytes * 1e6))
        train_tokenizer([corpus], model, max_bytes=_TRAINING_BYTES)
        tokenizer = load_sentencepiece(model)
        ours, plain = str(base / "ours"), str(base / "plain")
        seconds: dict[str, list[float]] = {"workers": [], "loop": []}
        for _ in range(REPEATS):
            seconds["workers"].append(
                _time(
                    lambda: preprocess([corpus], ours, tokenizer, workers=workers, progress=False)
                )
            )
            seconds["loop"].append(_time(lambda: _plain_loop(corpus, plain, model)))
        identical = all(
            pathlib.Path(ours + suffix).read_bytes() == pathlib.Path(plain + suffix).read_bytes()
            for suffix in (".bin", ".idx")
        )
    sides = {name: _statistics(times, text_bytes) for name, times in seconds.items()}
    return {
        "benchmark": "data",
        "text_bytes": text_bytes,
        "workers": workers,
        "cpus": os.cpu_count(),
        "sides": sides,
        "ratio": sides["loop"]["median_seconds"] / sides["workers"]["median_seconds"],
        "identical_output": identical,
        "python": platform.python_version(),
        "sentencepiece": sentencepiece.__version__,
    }


def _write_corpus(path: str, wanted: int) -> int:
    """Writes the standard library's files in random order as JSONL; returns the bytes of text."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts)
    random.Random(0).shuffle(files)
    size = 0
    with open(path, "w", encoding="utf-8") as output:
        for file in itertools.cycle(files):
            if size >= wanted:
                return size
            try:
                text = file.read_bytes().decode()
            except UnicodeDecodeError:  # files of the library's own tests of encodings
                continue
            if text:
                size += len(text.encode())
                output.write(json.dumps({"text": text}) + "\n")
    raise UserError(f"no text to measure with: there are no Python sources in {library}")


def _plain_loop(corpus: str, prefix: str, model: str) -> None:
    import numpy as np
    import sentencepiece
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    dtype = DType.optimal_dtype(processor.get_piece_size())
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    with open(corpus, encoding="utf-8") as lines:
        for line in lines:
            ids = processor.encode(json.loads(line)["text"])
            ids.append(processor.eos_id())
            builder.add_document(np.array(ids, dtype=dtype), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def _time(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _statistics(seconds: list[float], text_bytes: int) -> dict:
    median = statistics.median(seconds)
    return {
        "seconds": seconds,
        "median_seconds": median,
        "spread": (max(seconds) - min(seconds)) / median,
        "mb_per_second": text_bytes / median / 1e6,
    }


def _table(results: dict) -> str:
    rows = [f"{'':22}{'median s':>10}{'spread':>9}{'MB/s':>9}"]
    labels = {"workers": f"{results['workers']} worker process(es)", "loop": "plain loop"}
    for name, label in labels.items():
        side = results["sides"][name]
        rows.append(
            f"{label:22}{side['median_seconds']:>10.3f}{side['spread']:>9.1%}"
            f"{side['mb_per_second']:>9.2f}"
        )
    same = "the same" if results["identical_output"] else "DIFFERENT"
    rows.append(
        f"ratio {results['ratio']:.2f} on {results['cpus']} CPUs, "
        f"{results['text_bytes'] / 1e6:.1f} MB of text, {REPEATS} repeats each; output {same}"
    )
    return "\n".join(rows)
