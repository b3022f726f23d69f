"""Trains a sentencepiece tokenizer for masked diffusion.

The vocabulary begins with `<pad>`, `<eod>` (sentencepiece's eos piece, which Megatron takes as the
end-of-document token), `<unk>`, and the control symbol `<mask>`; there is no bos. Text never
encodes to any of these: a control symbol has no surface form, and characters that are not in the
vocabulary are encoded as bytes.

Encoding is lossless: it does not normalize text or add or remove spaces, and it keeps tabs and line
ends. The only exception is the character U+2581, sentencepiece's own sign for a space, which
decodes to a space.
"""

import dataclasses
import functools
import hashlib
import io
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from megatron_mdm.data.documents import (
    BadDocumentError,
    InputsDigest,
    document_text,
    read_documents,
)
from megatron_mdm.data.record import check_free, file_digest, read_record, record
from megatron_mdm.data.sampling import Reservoir
from megatron_mdm.data.workers import Workers
from megatron_mdm.errors import UserError, escaped
from megatron_mdm.files import complete_or_absent, termination_raises, write_errors

TOOL = "tools/train_tokenizer.py"
MASK_PIECE = "<mask>"
EOD_PIECE = "<eod>"
MODEL_TYPES = ("bpe", "unigram")
DEFAULT_VOCAB_SIZE = 8192
DEFAULT_MAX_BYTES = 100_000_000

# sentencepiece skips lines of more than 4192 bytes; a character has at most 4 bytes.
_LINE_CHARACTERS = 1000
_QUIET = 2  # a sentencepiece log level: errors only, which are raised as exceptions as well


@dataclasses.dataclass(frozen=True)
class TokenizerSummary:
    """A summary of what `train_tokenizer` did.

    Attributes:
        output: The model file.
        vocab_size: Number of pieces.
        eod_id: Id of the end-of-document piece.
        mask_id: Id of the mask piece.
        documents: Number of documents that were read.
        text_bytes: Length of the text that was read, as UTF-8.
        used_bytes: Length of the part that the model was trained on.
        bad_documents: Number of documents that were skipped because they cannot be read.
        seconds: Duration in seconds.
    """

    output: str
    vocab_size: int
    eod_id: int
    mask_id: int
    documents: int
    text_bytes: int
    used_bytes: int
    bad_documents: int
    seconds: float

    def __str__(self) -> str:
        text = f"{self.text_bytes / 1e6:,.1f} MB"
        if self.used_bytes < self.text_bytes:
            text = f"a sample of {self.used_bytes / 1e6:,.1f} MB from {text}"
        skipped = f", {self.bad_documents:,} bad skipped" if self.bad_documents else ""
        return (
            f"{escaped(self.output)}: {self.vocab_size:,} pieces "
            f"(eod {self.eod_id}, mask {self.mask_id}) "
            f"from {text} in {self.documents:,} documents{skipped}, {self.seconds:.1f} s"
        )


def train_tokenizer(
    inputs: Sequence[str],
    output: str,
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    model_type: str = "bpe",
    file_format: str = "auto",
    json_key: str = "text",
    max_bytes: int = DEFAULT_MAX_BYTES,
    skip_bad_lines: bool = False,
    unless_done: bool = False,
    command: Sequence[str] = (),
) -> TokenizerSummary | None:
    """Trains a sentencepiece model and writes it to `output`; writes a complete file or none.

    Also writes a record, whose name is `output` followed by `.json`. The same input gives the same
    model. A separate process trains the model, so that Ctrl-C ends the training at once.

    Args:
        inputs: Text and JSONL files, see `megatron_mdm.data.documents`.
        output: The model file, `SOMETHING.model`; replaced if it exists.
        vocab_size: Number of pieces, including the special ones and the 256 bytes.
        model_type: `bpe` or `unigram`.
        file_format: `auto`, `jsonl`, or `text`, see `read_documents`.
        json_key: The key of the text in a JSONL line.
        max_bytes: If there is more text than this, a random sample of its lines of this size is
            used.
        skip_bad_lines: Whether to skip documents that cannot be read.
        unless_done: Whether to keep an existing model that was made from inputs with the same
            contents and with the same options.
        command: The words of the command line, for the record.

    Returns:
        The summary, None if an existing model was kept.

    Raises:
        UserError: There is no text, a document cannot be read, the vocabulary size does not suit
            the text, or the output cannot be written or would replace another file.
    """
    start = time.perf_counter()
    if not output.endswith(".model"):
        # This also protects a corpus, if input and output are interchanged on the command line.
        raise UserError(f"--output {output}: must end in .model")
    if max_bytes < 1:
        raise UserError(f"--max-bytes {max_bytes}: must be at least 1")
    record_path = f"{output}.json"
    check_free(record_path, f"--output {output}")
    options = {
        "format": file_format,
        "json_key": json_key,
        "max_bytes": max_bytes,
        "skip_bad_lines": skip_bad_lines,
        "vocab_size": vocab_size,
        "model_type": model_type,
    }
    if unless_done and _is_made_from(output, inputs, options):
        return None
    corpus = _Corpus(list(inputs), file_format, json_key, max_bytes, skip_bad_lines)
    with (
        termination_raises(),
        complete_or_absent(record_path, output) as (temporary_record, temporary),
        Workers(1, _Trainer, corpus, vocab_size, model_type) as workers,
    ):
        summary: TokenizerSummary
        (summary, model, read) = next(workers.map([output]))
        with write_errors(output), open(temporary, "wb") as file:
            file.write(model)
        content = {"sha256": hashlib.sha256(model).hexdigest(), "inputs": read, "options": options}
        with write_errors(record_path), open(temporary_record, "w", encoding="utf-8") as file:
            file.write(record(TOOL, **content, command=list(command)))
    return dataclasses.replace(summary, seconds=time.perf_counter() - start)


def _is_made_from(output: str, inputs: Sequence[str], options: dict[str, Any]) -> bool:
    """Whether the model exists and was made from these files with these options."""
    found = read_record(f"{output}.json", TOOL)
    return (
        found is not None
        and found.get("options") == options
        and os.path.isfile(output)
        and found.get("sha256") == file_digest(output)
        and found.get("inputs") == InputsDigest().read(inputs)
    )


@dataclasses.dataclass
class _Corpus:
    """The lines to train on; the counts and the digest are valid after `lines` has returned."""

    inputs: list[str]
    file_format: str
    json_key: str
    max_bytes: int
    skip_bad_lines: bool
    documents: int = 0
    bad_documents: int = 0
    text_bytes: int = 0
    used_bytes: int = 0
    digest: str = ""

    def lines(self) -> list[str]:
        """Returns all lines, or a uniform sample of at most `max_bytes`, in order."""
        sample: Reservoir[str] = Reservoir(self.max_bytes)
        for line in self._all_lines():
            self.text_bytes += len(line.encode())
            sample.offer(functools.partial(_sized, line))
        sample.shrink(self.max_bytes)
        self.used_bytes = sample.size
        return sample.items()

    def _all_lines(self) -> Iterator[str]:
        digest = InputsDigest()
        for document in read_documents(self.inputs, self.file_format, digest):
            try:
                text = document_text(document, self.json_key)
            except BadDocumentError as error:
                if not self.skip_bad_lines:
                    raise UserError(f"{error}; fix it or pass --skip-bad-lines") from error
                self.bad_documents += 1
                continue
            self.documents += 1
            for line in io.StringIO(text, newline="\n"):  # form feeds do not end a line
                for begin in range(0, len(line), _LINE_CHARACTERS):
                    yield line[begin : begin + _LINE_CHARACTERS]
        self.digest = digest.hex()


class _Trainer:
    """Trains a model in a worker: output path -> (summary, bytes of the model, inputs' digest)."""

    def __init__(self, corpus: _Corpus, vocab_size: int, model_type: str) -> None:
        self._corpus = corpus
        self._vocab_size = vocab_size
        self._model_type = model_type

    def __call__(self, output: str) -> tuple[TokenizerSummary, bytes, str]:
        import sentencepiece

        corpus = self._corpus
        lines = corpus.lines()
        if not lines:
            raise UserError(f"--input: no text to train on in {len(corpus.inputs)} file(s)")
        model = _train(lines, self._vocab_size, self._model_type)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        summary = TokenizerSummary(
            output=os.fspath(output),
            vocab_size=processor.get_piece_size(),
            eod_id=processor.eos_id(),
            mask_id=processor.piece_to_id(MASK_PIECE),
            documents=corpus.documents,
            text_bytes=corpus.text_bytes,
            used_bytes=corpus.used_bytes,
            bad_documents=corpus.bad_documents,
            seconds=0.0,
        )
        return summary, model, corpus.digest


def _sized(line: str) -> tuple[int, str]:
    """Returns the length of a line as UTF-8, and the line."""
    return len(line.encode()), line


def _train(lines: Iterable[str], vocab_size: int, model_type: str) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Source code has much indentation.
            allow_whitespace_only_pieces=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            eos_piece=EOD_PIECE,
            unk_piece="<unk>",
            control_symbols=[MASK_PIECE],
            # Fixed, because the order of summation in a unigram model depends on it.
            num_threads=4,
            minloglevel=_QUIET,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    return model.getvalue()


def _training_error(message: str, vocab_size: int) -> UserError:
    flag = f"--vocab-size {vocab_size}"
    if match := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        return UserError(f"{flag}: too large for this text, which allows {match[1]} at most")
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(f"{flag}: too small, this text needs {match[1]} at least")
    if "!sentences_.empty()" in message:
        return UserError("--input: no text to train on")
    return UserError(f"{flag}: sentencepiece refuses: {' '.join(message.split())}")
