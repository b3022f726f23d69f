"""Turns text into Megatron's indexed datasets (`.bin` and `.idx`), with several processes.

The parent reads the files and sends chunks of documents to workers, which parse and tokenize
them. The parent writes the results in the order of the input, so the output does not depend on the
number of workers. Only a few chunks per worker are in memory at a time.

Documents with faults:

* A document without tokens (an empty file, `{"text": ""}`) is left out and counted. It is not an
  error: source trees have many empty files.
* A document that cannot be read (not UTF-8, bad JSON, no such key, not a string, a lone surrogate,
  a conversation that its template does not render completely), or whose text would be encoded as a
  special token that it spells, stops the run. With `skip_bad_lines` it is left out and counted.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from megatron_mdm.data.documents import Document, InputsDigest, read_documents
from megatron_mdm.data.encoding import ChunkEncoder, EncodedChunk, TokenizerData
from megatron_mdm.data.identity import is_made_from, record_of
from megatron_mdm.data.pairs import PairEncoder, PairKeys
from megatron_mdm.data.record import check_free
from megatron_mdm.data.workers import Workers
from megatron_mdm.environment import silent_import
from megatron_mdm.errors import UserError, escaped
from megatron_mdm.files import complete_or_absent, termination_raises, write_errors

# Bytes of text in a chunk: large enough that sending it costs little compared to tokenizing it, and
# small enough that the workers finish at about the same time.
CHUNK_BYTES = 1 << 18
_BAD_SHOWN = 5


@dataclasses.dataclass
class PreprocessSummary:
    """A summary of the files that `preprocess` wrote.

    Attributes:
        output_prefix: Prefix of the files; the suffixes are `.bin`, `.idx` and, for the record,
            `.json`.
        dtype: Data type of a token in the `.bin` file.
        workers: Number of worker processes.
        documents: Documents written.
        tokens: Tokens written, including end-of-document tokens.
        text_bytes: Length of the documents as UTF-8.
        empty_documents: Documents left out because they have no tokens.
        bad_documents: Documents left out because they cannot be read.
        bad_examples: `FILE:LINE: REASON` for the first few of those.
        template_date: The date that a chat template wrote for today's date, None if it wrote none.
        spelling: Conversations that spell special tokens, which were encoded as text.
        seconds: Duration in seconds.
    """

    output_prefix: str
    dtype: str
    workers: int
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    bad_documents: int = 0
    bad_examples: list[str] = dataclasses.field(default_factory=list)
    template_date: str | None = None
    spelling: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"{escaped(self.output_prefix)}.bin, .idx, .json: {self.documents:,} documents, "
            f"{self.tokens:,} tokens ({self.dtype}), {self.text_bytes:,} bytes of text",
            f"{self.seconds:.1f} s with {self.workers} worker(s): "
            f"{self.tokens / self.seconds:,.0f} tokens/s, "
            f"{self.text_bytes / self.seconds / 1e6:.2f} MB/s; "
            f"{self.text_bytes / self.tokens:.3f} bytes per token",
            f"skipped: {self.empty_documents:,} empty, {self.bad_documents:,} bad documents",
        ]
        lines += [f"  {example}" for example in self.bad_examples]
        if self.bad_documents > len(self.bad_examples):
            lines.append("  ...")
        if self.template_date is not None:
            lines.append(
                f"the chat template wrote {self.template_date} for today's date (--template-date)"
            )
        if self.spelling:
            lines.append(
                f"conversations that spell special tokens, which were encoded as ordinary text: "
                f"{self.spelling:,}"
            )
        return "\n".join(lines)


def default_workers() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer: TokenizerData,
    *,
    file_format: str = "auto",
    json_key: str = "text",
    pairs: PairKeys | None = None,
    append_eod: bool = True,
    special_tokens: bool | None = None,
    workers: int | None = None,
    skip_bad_lines: bool = False,
    progress: bool = True,
    unless_done: bool = False,
    replace: bool = True,
    command: Sequence[str] = (),
) -> PreprocessSummary | None:
    """Tokenizes files into `OUTPUT_PREFIX.bin` and `.idx`; writes complete files or none.

    Also writes their record, `OUTPUT_PREFIX.json`, see `megatron_mdm.data.identity`. Replaces
    existing files by default. Starts processes by the `spawn` method, so a script that calls this
    function needs the usual `if __name__ == "__main__"`.

    Args:
        inputs: Text and JSONL files, see `megatron_mdm.data.documents`.
        output_prefix: Path of the files without suffixes.
        tokenizer: A tokenizer from `load_tokenizer`.
        file_format: `auto`, `jsonl`, or `text`, see `read_documents`.
        json_key: The key of the text in a JSONL line.
        pairs: The keys of prompt and response in a JSONL line. If given, each document has two
            sequences, and `json_key` is not used.
        append_eod: Whether to end each document with the end-of-document token.
        special_tokens: Whether text that spells a special token is encoded as that token; None:
            only for conversations, whose template writes special tokens. A special token that a
            string of a conversation's row spells is always encoded as text.
        workers: Number of processes; `default_workers()` if None. Does not change the output.
        skip_bad_lines: Whether to leave out documents that cannot be read instead of stopping.
        progress: Whether to show a progress bar on stderr.
        unless_done: Whether to keep existing files that were made from inputs with the same
            contents and with the same tokenizer and options.
        replace: Whether to replace other existing files.
        command: The words of the command line, for the record.

    Returns:
        The summary, None if existing files were kept.

    Raises:
        UserError: A document cannot be read, there are no documents, the tokenizer has no
            end-of-document token, the output cannot be written, would replace a file that is not a
            record or must not be replaced, or a worker died.
    """
    start = time.perf_counter()
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    if append_eod and tokenizer.eod is None:
        raise UserError(
            "the tokenizer has no end-of-document token (eos or sep): pass --no-append-eod to do "
            "without"
        )
    special_tokens = _special_tokens(special_tokens, tokenizer, pairs)
    check_free(f"{output_prefix}.json", f"--output-prefix {output_prefix}")
    options = {
        "format": file_format,
        "append_eod": append_eod,
        "special_tokens": special_tokens,
        "skip_bad_lines": skip_bad_lines,
        "tokenizer": tokenizer.digest(),
        **({"json_key": json_key} if pairs is None else pairs.options()),
    }
    if unless_done and is_made_from(output_prefix, inputs, options):
        return None
    if not replace and os.path.lexists(f"{output_prefix}.idx"):
        was = ", and was made from other inputs or options" if unless_done else ""
        raise UserError(
            f"{output_prefix}.idx exists{was}: give another --output-prefix, or remove what was "
            "made with it (--no-replace)"
        )
    summary = PreprocessSummary(output_prefix, "", workers)
    encoder = (
        (ChunkEncoder, tokenizer, json_key) if pairs is None else (PairEncoder, tokenizer, pairs)
    )
    # The index comes last: its presence means that the other files are complete.
    targets = [f"{output_prefix}{suffix}" for suffix in (".bin", ".json", ".idx")]
    read = InputsDigest()
    with termination_raises(), complete_or_absent(*targets) as (bin_path, record_path, idx_path):
        with (
            Workers(workers, *encoder, append_eod, special_tokens) as pool,
            _indexed_dataset(bin_path, idx_path, tokenizer.vocab_size, output_prefix) as builder,
            _Progress(inputs, progress) as bar,
        ):
            summary.dtype = builder.dtype.__name__
            for result in pool.map(_chunks(read_documents(inputs, file_format, read))):
                _count(summary, result, skip_bad_lines)
                _write(builder, result, output_prefix)
                if result.is_dated and pairs is not None:
                    summary.template_date = pairs.date.isoformat()
                bar.show(result.position, summary.documents)
            if summary.documents == 0:
                raise UserError(
                    f"no documents in {len(inputs)} input file(s): {summary.empty_documents:,} "
                    f"empty, {summary.bad_documents:,} bad"
                )
        with write_errors(targets[1]), open(record_path, "w", encoding="utf-8") as file:
            file.write(
                record_of(
                    (bin_path, idx_path),
                    tokenizer,
                    kind="text" if pairs is None else "pairs",
                    special_tokens=special_tokens,
                    template_date=summary.template_date,
                    documents=summary.documents,
                    tokens=summary.tokens,
                    inputs=read.hex(),
                    options=options,
                    command=list(command),
                )
            )
    summary.seconds = time.perf_counter() - start
    return summary


def _special_tokens(
    asked_for: bool | None, tokenizer: TokenizerData, pairs: PairKeys | None
) -> bool:
    """Determines whether text that spells a special token is encoded as that token.

    Raises:
        UserError: The tokenizer or the pairs do not allow the given choice.
    """
    are_conversations = pairs is not None and pairs.messages is not None
    if asked_for is False and are_conversations:
        raise UserError(
            "--no-special-tokens: a chat template writes special tokens, so leave it out with "
            "--messages-key"
        )
    if asked_for and tokenizer.sentencepiece_model is not None:
        raise UserError(
            "--special-tokens: no text spells a special token of a sentencepiece model; leave it "
            "out, or give --hf-tokenizer"
        )
    return are_conversations if asked_for is None else asked_for


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document.data)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _count(summary: PreprocessSummary, result: EncodedChunk, skip_bad_lines: bool) -> None:
    if result.bad and not skip_bad_lines:
        raise UserError(f"{result.bad[0]}; fix it or pass --skip-bad-lines")
    summary.documents += len(result.lengths)
    summary.tokens += len(result.tokens)
    summary.text_bytes += result.text_bytes
    summary.empty_documents += result.empty
    summary.bad_documents += len(result.bad)
    summary.spelling += result.spelling
    room = _BAD_SHOWN - len(summary.bad_examples)
    summary.bad_examples += result.bad[:room]


def _write(builder: Any, result: EncodedChunk, output_prefix: str) -> None:
    start = 0
    with write_errors(f"{output_prefix}.bin"):
        for lengths in result.lengths:
            end = start + sum(lengths)
            builder.add_document(result.tokens[start:end], lengths)
            start = end


@contextmanager
def _indexed_dataset(
    bin_path: str, idx_path: str, vocab_size: int, output_prefix: str
) -> Iterator[Any]:
    """Yields Megatron's dataset builder, and finishes its files unless the block fails."""
    with silent_import():
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    with write_errors(f"{output_prefix}.bin"):
        builder = IndexedDatasetBuilder(bin_path, dtype=DType.optimal_dtype(vocab_size))
    try:
        yield builder
        with write_errors(f"{output_prefix}.bin"):
            builder.data_file.close()
        with write_errors(f"{output_prefix}.idx"):
            builder.finalize(idx_path)
    finally:
        with suppress(OSError):  # the disk may be full; the unfinished file is removed anyway
            builder.data_file.close()


class _Progress:
    """A progress bar over the bytes of the input files, with the rate of documents."""

    def __init__(self, inputs: Sequence[str], enabled: bool) -> None:
        self._total = sum(os.path.getsize(path) for path in inputs)
        self._enabled = enabled

    def __enter__(self) -> "_Progress":
        # In a log file every update is a line, so update less often.
        interval = 0.5 if sys.stderr.isatty() else 30
        self._bar = tqdm(
            total=self._total,
            unit="B",
            unit_scale=True,
            mininterval=interval,
            maxinterval=max(10, interval),
            disable=not self._enabled,
        )
        self._start = time.perf_counter()
        return self

    def show(self, position: int, documents: int) -> None:
        rate = documents / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{rate:,.0f} docs/s", refresh=False)
        self._bar.update(position - self._bar.n)

    def __exit__(self, *_exception: object) -> None:
        self._bar.close()
