"""Trains a sentencepiece tokenizer for masked diffusion on text or JSONL files.

    python tools/train_tokenizer.py --input corpus.jsonl.gz --vocab-size 16384 --output code.model

The tokenizer has <pad>, <eod> (end of document, as sentencepiece's eos), <unk> and <mask>. No text
encodes to <mask>. Encoding is lossless: spaces, tabs and line ends are kept, and bytes stand in for
characters outside the vocabulary. The same input gives the same tokenizer. If the run fails or is
interrupted, nothing is written.
"""

import argparse
import sys

from megatron_mdm.data import tokenizer
from megatron_mdm.data.documents import add_format_argument, resolve_inputs
from megatron_mdm.errors import escaped, run_tool


def main() -> None:
    """Parses, trains, prints one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="PATH", help="text or JSONL files, plain or .gz"
    )
    parser.add_argument("--input-list", metavar="FILE", help="file with one path per line")
    parser.add_argument(
        "--output",
        required=True,
        metavar="X.model",
        help="model file to write, with its record X.model.json; existing files are replaced",
    )
    parser.add_argument(
        "--unless-done",
        action="store_true",
        help="do nothing if the record says that the existing model was made from inputs with the "
        "same contents, with the same options",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=tokenizer.DEFAULT_VOCAB_SIZE,
        metavar="N",
        help="number of pieces, with special pieces and 256 bytes (default: %(default)s)",
    )
    parser.add_argument(
        "--model-type",
        choices=tokenizer.MODEL_TYPES,
        default="bpe",
        help="sentencepiece model type (default: %(default)s)",
    )
    add_format_argument(parser, "format of the input files")
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="key of the text in lines of JSONL (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=tokenizer.DEFAULT_MAX_BYTES,
        metavar="N",
        help="if there is more text than N bytes, train on a random sample of lines of this size; "
        "memory grows with N (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="skip and count documents that cannot be read instead of stopping at the first",
    )
    args = parser.parse_args()
    summary = tokenizer.train_tokenizer(
        resolve_inputs(args.input, args.input_list),
        args.output,
        vocab_size=args.vocab_size,
        model_type=args.model_type,
        file_format=args.format,
        json_key=args.json_key,
        max_bytes=args.max_bytes,
        skip_bad_lines=args.skip_bad_lines,
        unless_done=args.unless_done,
        command=["train_tokenizer.py", *sys.argv[1:]],
    )
    print(summary or f"{escaped(args.output)}: already made from these inputs and options")


if __name__ == "__main__":
    run_tool(main)
