"""Writes text with a checkpoint, or fills gaps in a text.

    python tools/generate.py --load runs/quickstart/checkpoint --device cpu --prompt "def read(f):"
    python tools/generate.py --load checkpoints --prompt "f(<mask>):" --suffix " return" --length 8
    python tools/generate.py --load checkpoints --messages chat.json --length 128 --block-length 32

Under torchrun the ranks share the model: as pipeline stages, and as tensor-parallel ranks of each
stage.
"""

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from megatron_mdm.checkpoint import (
    add_block_size_argument,
    add_checkpoint_arguments,
    open_asked_for,
)
from megatron_mdm.config import flag
from megatron_mdm.data.documents import add_format_argument
from megatron_mdm.errors import UserError, escaped, run_tool
from megatron_mdm.files import check_picture
from megatron_mdm.generation.decoder_flags import (
    DECODER_FLAGS,
    SAMPLING_FLAGS,
    add_decoder_arguments,
    add_sampling_arguments,
    add_token_arguments,
)
from megatron_mdm.generation.display import PICTURES, Screen, draw_order, shown_on
from megatron_mdm.generation.prompts import (
    Spelling,
    prompt_tokens,
    read_conversations,
    read_prompts,
    same_lengths,
    until_end,
)

if TYPE_CHECKING:
    from megatron_mdm.mcore.inference.loaded_model import LoadedModel


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_arguments(parser)
    text = parser.add_argument_group("text")
    text.add_argument(
        "--prompt", action="append", help="text at the start of the output; may be repeated"
    )
    text.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="text file with one prompt per line, or JSONL file, whose prompts may have several "
        "lines",
    )
    add_format_argument(text, "format of --prompts-file, where text has one prompt per line")
    text.add_argument(
        "--json-key",
        default="prompt",
        metavar="KEY",
        help="key of the prompt in lines of JSONL (default: %(default)s)",
    )
    text.add_argument(
        "--messages",
        metavar="FILE",
        help="conversations to answer: JSONL with one conversation per line, or JSON with one "
        "conversation. They are rendered and encoded like the data of preprocess_data.py "
        "--messages-key. Only the answers are printed",
    )
    text.add_argument(
        "--messages-key",
        metavar="KEY",
        help="key of the list of messages in an object of --messages (default: messages)",
    )
    text.add_argument(
        "--ignore-keys",
        nargs="+",
        metavar="KEY",
        help="keys of --messages to leave out, as in preprocess_data.py",
    )
    text.add_argument(
        "--length",
        type=int,
        default=64,
        help="number of tokens to write after the prompt (default: 64)",
    )
    text.add_argument("--suffix", default="", help="text after the written tokens")
    text.add_argument(
        "--mask-marker",
        default="<mask>",
        metavar="TEXT",
        help="text that stands for one token to fill in, in prompts and suffix (default: <mask>)",
    )
    add_token_arguments(text)
    text.add_argument(
        "--no-stop-at-eos", action="store_true", help="continue after a token that ends a text"
    )
    decoder = parser.add_argument_group("decoder")
    add_decoder_arguments(decoder)
    add_sampling_arguments(decoder)
    add_block_size_argument(decoder)
    decoder.add_argument(
        "--kv-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep keys and values of finished blocks of a model with blocks; without them each "
        "call computes the whole text so far (default: on)",
    )
    decoder.add_argument(
        "--seed", type=int, default=0, help="seed of the random numbers (default: 0)"
    )
    decoder.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="prompts of one length per model call (default: 8)",
    )
    shown = parser.add_argument_group("display")
    shown.add_argument(
        "--show",
        action="store_true",
        help="show the text after each model call; a terminal shows it in place",
    )
    shown.add_argument(
        "--picture",
        metavar="FILE",
        help="picture of the order in which tokens were filled in: .png, or .gif for an animation "
        "(one prompt only)",
    )
    options = parser.parse_args()
    for name, least in (("length", 0), ("batch_size", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    if not options.mask_marker:
        raise UserError("--mask-marker must not be empty")
    if not options.messages:
        for name in ("messages_key", "ignore_keys"):
            if getattr(options, name) is not None:
                raise UserError(f"{flag(name)} is for --messages: leave it out")
    options.messages_key = options.messages_key or "messages"
    if options.messages and options.special_tokens is False:
        raise UserError(
            "--no-special-tokens: a chat template writes special tokens, so leave it out with "
            "--messages"
        )
    return options


def main() -> None:
    """Loads, decodes, prints."""
    options = parse()
    prompts = options.prompt or []
    if options.prompts_file:
        prompts = prompts + read_prompts(options.prompts_file, options.json_key, options.format)
    chats = read_conversations(options.messages, options.messages_key) if options.messages else []
    prompts = prompts if prompts or chats else [""]
    number = len(prompts) + len(chats)
    if options.picture:
        check_picture(options.picture, "--picture", PICTURES)
        if number > 1:
            raise UserError(f"--picture draws one prompt, and there are {number}")

    with open_asked_for(options, block_size=options.block_size) as loaded:
        import torch

        from megatron_mdm.generation.decoder import filling_order
        from megatron_mdm.mcore.inference.eval_data import (
            chat_encoder,
            decoder_of,
            decoding_logits,
            encoder,
            spells_special_tokens,
        )

        mask = loaded.mask_token_id
        special = spells_special_tokens(loaded.args, options.special_tokens)
        tokenize, detokenize = encoder(loaded, special), loaded.tokenizer.detokenize
        decoder = decoder_of(
            loaded,
            () if options.no_stop_at_eos else options.eos_token_ids,
            **{name: getattr(options, name) for name in (*DECODER_FLAGS, *SAMPLING_FLAGS)},
        )
        if options.cfg_scale and loaded.args.mdm_shift:
            raise UserError(
                "--cfg-scale masks whole prompts, and a shifted model (--mdm-shift) cannot predict "
                "the first token of a text: leave it out"
            )
        row_of = partial(
            prompt_tokens,
            tokenize,
            length=options.length,
            suffix=options.suffix,
            marker=options.mask_marker,
            mask_token_id=mask,
        )
        rows = [row_of(text) for text in prompts]
        unprinted = [0] * len(prompts)
        if chats:
            chat = chat_encoder(loaded, options.messages_key, options.ignore_keys or ())
            for document in chats:
                asked = chat.prompt(document)
                rows.append([*asked, *row_of("")])
                unprinted.append(len(asked))
        openings = [opening(loaded, row, f"prompt {i}") for i, row in enumerate(rows, 1)]
        rows = [[*first, *row] for first, row in zip(openings, rows, strict=True)]
        for i, row in enumerate(rows, 1):
            check_row(row, f"prompt {i}", mask, loaded.max_length)
            if loaded.block_size is not None and any(x != mask for x in row[row.index(mask) :]):
                raise UserError(
                    f"prompt {i}: blocks of {loaded.block_size} tokens do not see the text after "
                    "them: leave out --suffix and the --mask-marker, or use --block-size row"
                )
        spelling = Spelling(tokenize, detokenize, mask)
        device = torch.cuda.current_device()
        screen = Screen(sys.stdout) if options.show and loaded.args.rank == 0 else None
        texts = {}
        for batch in same_lengths(rows, options.batch_size):
            # Each row has its own generator: a text does not depend on the other rows of a call.
            seeds = [np.random.SeedSequence([options.seed, i]).generate_state(1)[0] for i in batch]
            generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
            states = []
            tokens = torch.tensor([rows[i] for i in batch], device=device)
            logits = decoding_logits(loaded, tokens.shape[1], options.kv_cache)
            for step, state in enumerate(decoder.states(logits, tokens, generators)):
                written = [
                    row[len(openings[i]) :] for i, row in zip(batch, state.tolist(), strict=True)
                ]
                if screen:
                    screen.show(step, [spelling.partial(row) for row in written])
                if options.picture:
                    states.append(state)
            if screen:
                screen.clear()
            if options.picture and loaded.args.rank == 0:
                pieces = [spelling.inside([token]) for token in written[0]]
                order = filling_order(states, mask)[0].tolist()[-len(pieces) :]
                draw_order(options.picture, pieces, order)
            for i, row in zip(batch, written, strict=True):
                given = [token != mask for token in rows[i][len(openings[i]) :]]
                whole = until_end(row, given, decoder.end_token_ids)
                texts[i] = detokenize(whole[unprinted[i] :])
        if loaded.args.rank == 0:
            for i in range(number):
                if number > 1:
                    print(f"== prompt {i + 1}")
                print(shown_on(sys.stdout, texts[i]))
            if options.picture:
                print(f"picture: {escaped(options.picture)}", file=sys.stderr)


def opening(loaded: "LoadedModel", row: list[int], name: str) -> list[int]:
    """Tokens that the model needs before a row to predict its first token; they are not printed.

    Raises:
        UserError: a token is needed, and the model has none for this purpose.
    """
    if not loaded.args.mdm_shift or row[:1] != [loaded.mask_token_id]:
        return []
    if loaded.opening_token_id is None:
        raise UserError(
            f"{name}: a shifted model (--mdm-shift) cannot write the first token of a text: its "
            "tokenizer has no end of document to begin after, or training never placed that "
            "token before a document (--mdm-isolate-documents); give a --prompt that starts with a "
            "token"
        )
    return [loaded.opening_token_id]


def check_row(row: list[int], name: str, mask_token_id: int, positions: int) -> None:
    """Checks that a row fits into the model and has a gap to fill.

    Raises:
        UserError: the row is too long or has no gap.
    """
    if len(row) > positions:
        raise UserError(
            f"{name}: its tokens, --length and --suffix make {len(row)} positions, and the model "
            f"has {positions}: shorten one of them"
        )
    if mask_token_id not in row:
        raise UserError(
            f"{name}: nothing to write: give a --length of at least 1, or mark gaps in the text "
            "with the --mask-marker"
        )


if __name__ == "__main__":
    run_tool(main)
