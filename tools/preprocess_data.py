r"""Tokenizes text or JSONL files into a Megatron dataset: P.bin, P.idx and their record, P.json.

    python tools/preprocess_data.py --input corpus.jsonl.gz --tokenizer-model code.model \
        --output-prefix data/corpus
    python tools/preprocess_data.py --input-list files.txt --hf-tokenizer my_tokenizer/ \
        --output-prefix data/source --skip-bad-lines
    python tools/preprocess_data.py --input chats.jsonl --messages-key messages \
        --hf-tokenizer my_tokenizer/ --output-prefix data/chats

files.txt has one path per line: find src -name '*.py' | sort > files.txt

Documents keep their order, and the output is the same for every number of workers. Each document
ends with the tokenizer's end-of-document token. Empty documents are left out and counted. Without
--special-tokens, text that spells a special token, such as <mask>, is encoded as ordinary text. The
tool refuses a document if the tokenizer cannot do that, or if the mask token is among its tokens,
because training would stop there. If the run fails or is interrupted, nothing is written. With
--prompt-key or --messages-key the documents are pairs of a prompt and a response, for fine-tuning
with --mdm-sft.
"""

import argparse
import datetime
import sys

from megatron_mdm.config import flag
from megatron_mdm.data import preprocess
from megatron_mdm.data.chat import TEMPLATE_DATE
from megatron_mdm.data.documents import add_format_argument, resolve_inputs
from megatron_mdm.data.load_tokenizer import (
    has_chat_template,
    load_hugging_face,
    load_sentencepiece,
)
from megatron_mdm.data.pairs import PairKeys
from megatron_mdm.errors import UserError, escaped, run_tool


def main() -> None:
    """Parses, tokenizes, prints a summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="PATH", help="text or JSONL files, plain or .gz"
    )
    parser.add_argument("--input-list", metavar="FILE", help="file with one path per line")
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="P",
        help="prefix of the files to write: P.bin, P.idx and P.json; existing files are replaced",
    )
    parser.add_argument(
        "--unless-done",
        action="store_true",
        help="do nothing if P.json says that the existing files were made from inputs with the "
        "same contents, with the same tokenizer and options",
    )
    parser.add_argument(
        "--no-replace",
        dest="replace",
        action="store_false",
        help="stop instead of replacing P.bin and P.idx, which a run may be training on",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer-model", metavar="X.model", help="sentencepiece model")
    which.add_argument(
        "--hf-tokenizer",
        metavar="DIR",
        help="directory of a Hugging Face tokenizer; needs transformers",
    )
    add_format_argument(parser, "format of the input files")
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="key of the text in lines of JSONL (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt-key",
        metavar="KEY",
        help="for --mdm-sft: key of the prompt in lines of JSONL; each document is then a pair",
    )
    parser.add_argument(
        "--response-key", metavar="KEY", help="key of the response (default: response)"
    )
    parser.add_argument(
        "--messages-key",
        metavar="KEY",
        help="for --mdm-sft: key of a conversation in lines of JSONL; the chat template of "
        "--hf-tokenizer renders it, and the last message, the assistant's, is the response",
    )
    parser.add_argument(
        "--turns",
        choices=["last", "every"],
        help="for --messages-key: answers of the assistant that become pairs: the last message "
        "(default), or every answer to a message, as if the conversation ended there. The text "
        "before an answer is repeated for each of them",
    )
    parser.add_argument(
        "--ignore-keys",
        nargs="+",
        metavar="KEY",
        help="for --messages-key: keys of the lines and of their messages to leave out; every "
        "other key must change what the chat template renders. The template gets tools, documents "
        "and the other keys of a line as variables",
    )
    parser.add_argument(
        "--template-date",
        metavar="YYYY-MM-DD",
        help="for --messages-key: date that a chat template gets if it asks for today's date "
        f"(default: {TEMPLATE_DATE})",
    )
    parser.add_argument(
        "--no-append-eod",
        dest="append_eod",
        action="store_false",
        help="do not end each document with the end-of-document token",
    )
    parser.add_argument(
        "--special-tokens",
        action=argparse.BooleanOptionalAction,
        help="encode text that spells a special token, as rendered prompts do, as that token, or "
        "as ordinary text (default: as ordinary text; with --messages-key, as that token where the "
        "template spells it). With --messages-key, strings of a line always stay ordinary text. "
        "tools/generate.py does the same as the data of its checkpoint",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=preprocess.default_workers(),
        metavar="N",
        help="number of worker processes (default: the number of available CPUs, here %(default)s)",
    )
    parser.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="skip and count bad documents instead of stopping at the first: documents that cannot "
        "be read (bad JSON, no such key, not a string, not UTF-8), and documents that spell a "
        "special token which cannot be encoded as text; in text files a document is the whole file",
    )
    args = parser.parse_args()
    inputs = resolve_inputs(args.input, args.input_list)
    if args.tokenizer_model is not None:
        tokenizer = load_sentencepiece(args.tokenizer_model)
    else:
        tokenizer = load_hugging_face(args.hf_tokenizer)
    pairs = _pairs(args)
    summary = preprocess.preprocess(
        inputs,
        args.output_prefix,
        tokenizer,
        file_format=args.format,
        json_key=args.json_key,
        pairs=pairs,
        append_eod=args.append_eod,
        special_tokens=args.special_tokens,
        workers=args.workers,
        skip_bad_lines=args.skip_bad_lines,
        unless_done=args.unless_done,
        replace=args.replace,
        command=["preprocess_data.py", *sys.argv[1:]],
    )
    prefix = escaped(args.output_prefix)
    print(summary or f"{prefix}.bin, .idx, .json: already made from these inputs and options")


def _pairs(args: argparse.Namespace) -> PairKeys | None:
    if args.messages_key is not None:
        if args.prompt_key or args.response_key:
            raise UserError("--messages-key excludes --prompt-key and --response-key")
        if args.hf_tokenizer is None:
            raise UserError("--messages-key needs --hf-tokenizer, which has the chat template")
        if not has_chat_template(args.hf_tokenizer):
            raise UserError(f"--hf-tokenizer {args.hf_tokenizer}: it has no chat template")
        ignored = tuple(args.ignore_keys or ())
        for key in {"role", "content", "type", "text", args.messages_key}.intersection(ignored):
            raise UserError(f"--ignore-keys {key}: a conversation cannot do without it")
        try:
            date = datetime.date.fromisoformat(args.template_date or str(TEMPLATE_DATE))
        except ValueError as error:
            raise UserError(f"--template-date {args.template_date}: give YYYY-MM-DD") from error
        return PairKeys(
            messages=args.messages_key,
            template=args.hf_tokenizer,
            ignored=ignored,
            date=date,
            turns=args.turns or "last",
        )
    for name in ("turns", "ignore_keys", "template_date"):
        if getattr(args, name) is not None:
            raise UserError(f"{flag(name)} is for --messages-key: leave it out")
    if args.prompt_key or args.response_key:
        return PairKeys(args.prompt_key or "prompt", args.response_key or "response")
    return None


if __name__ == "__main__":
    run_tool(main)
