"""Command line of megatron_mdm.data.tokenizer."""

import argparse
import sys

from megatron_mdm.data import tokenizer
from megatron_mdm.data.documents import add_format_argument, resolve_inputs
from megatron_mdm.errors import escaped, run_tool

DESCRIPTION = """\
Train a sentencepiece tokenizer for masked diffusion on text or JSONL files.

The model has <pad>, <eod> (end of document, as sentencepiece's eos), <unk>, and <mask>, which no
text encodes to. Encoding is lossless: spaces, tabs, and line ends are kept; bytes stand in for
characters outside the vocabulary. The same input gives the same model. If the run fails or is
interrupted, nothing is written.
"""

EXAMPLES = """\
example:
  python tools/train_tokenizer.py --input corpus.jsonl.gz --vocab-size 16384 --output code.model
"""


def main() -> None:
    """Parses, trains, prints one line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="PATH", help="text or JSONL files, plain or .gz"
    )
    parser.add_argument("--input-list", metavar="FILE", help="file with one such path per line")
    parser.add_argument(
        "--output",
        required=True,
        metavar="X.model",
        help="model file to write, and its record, X.model.json; replaced if they exist",
    )
    parser.add_argument(
        "--unless-done",
        action="store_true",
        help="do nothing if the record says that the model that is there was made from the same "
        "inputs, whose contents count, with the same options",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=tokenizer.DEFAULT_VOCAB_SIZE,
        metavar="N",
        help="pieces, special ones and 256 bytes included (default: %(default)s)",
    )
    parser.add_argument(
        "--model-type",
        choices=tokenizer.MODEL_TYPES,
        default="bpe",
        help="kind of model (default: %(default)s)",
    )
    add_format_argument(parser, "of the input files")
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="where JSONL lines hold the text (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=tokenizer.DEFAULT_MAX_BYTES,
        metavar="N",
        help="train on a random sample of lines of this size if there is more text; memory grows "
        "with it (default: %(default)s)",
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
