"""Prompts: from text with marked gaps to rows of tokens, and back to text."""

import json
from collections.abc import Callable, Sequence

from megatron_mdm.data.documents import Document, document_text, read_documents, split_lines
from megatron_mdm.errors import UserError

Tokenize = Callable[[str], list[int]]
Detokenize = Callable[[list[int]], str]


def read_prompts(path: str, json_key: str = "prompt", file_format: str = "auto") -> list[str]:
    """Reads prompts: one per line (blank lines are skipped), or one per JSONL line.

    Args:
        path: the file with prompts.
        json_key: key of the prompt in a JSONL line.
        file_format: see `read_documents`.

    Raises:
        UserError: the file cannot be read, or contains no prompt.
    """
    prompts = []
    for document in read_documents([path], file_format):
        text = document_text(document, json_key)
        if document.line:
            prompts.append(text)
        else:
            prompts += [line for line in split_lines(text) if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {path} holds no prompt: write one a line")
    return prompts


def read_conversations(path: str, key: str = "messages") -> list[Document]:
    """Reads conversations: one JSON object per line, as for preprocessing, or a single one.

    Args:
        path: the file. A single conversation may be an object or a list of messages, over any
            number of lines.
        key: key of the messages in an object.

    Returns:
        Documents, each with one JSON object.

    Raises:
        UserError: the file cannot be read, or contains no conversation.
    """
    (whole,) = read_documents([path], "text")
    try:
        value = json.loads(whole.data)
    except ValueError:
        value = None
    if isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value):
        value = {key: value}
    if isinstance(value, dict):
        return [whole._replace(line=1, data=json.dumps(value).encode())]
    documents = list(read_documents([path], "jsonl"))
    if not documents:
        raise UserError(f"--messages {path} holds no conversation: write one a line")
    return documents


def prompt_tokens(
    tokenize: Tokenize, prompt: str, length: int, suffix: str, marker: str, mask_token_id: int
) -> list[int]:
    """Makes a row: the tokens of `prompt`, `length` mask tokens, and the tokens of `suffix`.

    Args:
        tokenize: text -> ids, without special tokens in front.
        prompt: text of the prompt; may contain markers.
        length: number of mask tokens between prompt and suffix.
        suffix: text after them; may contain markers.
        marker: text that becomes one mask token. The texts between markers are tokenized
            separately.
        mask_token_id: id of the mask token.
    """
    tokens: list[int] = []
    for part, wanted in ((prompt, length), (suffix, 0)):
        pieces = part.split(marker)
        for number, piece in enumerate(pieces):
            tokens += tokenize(piece) if piece else []
            tokens += [mask_token_id] * (number + 1 < len(pieces))
        tokens += [mask_token_id] * wanted
    return tokens


def same_lengths(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Batches of at most `batch_size` indices of rows with equal lengths.

    The rows of a batch need no padding, so no row can attend to padding.
    """
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)
    return [
        group[first : first + batch_size]
        for group in by_length.values()
        for first in range(0, len(group), batch_size)
    ]


def until_end(
    tokens: Sequence[int], given: Sequence[bool], end_token_ids: Sequence[int]
) -> list[int]:
    """The tokens before the first end token that follows the last given position."""
    start = max((i + 1 for i, known in enumerate(given) if known), default=0)
    ends = (i for i in range(start, len(tokens)) if tokens[i] in end_token_ids)
    return list(tokens[: next(ends, len(tokens))])


class Spelling:
    """Turns single tokens and partly filled rows into the text that they have inside a text.

    Tokenizers drop a space at the start of a text, but keep it inside a text. A known token (the
    anchor) is therefore put in front before detokenization, and its text is removed from the
    result.

    Attributes:
        detokenize: ids -> text.
        mask_token_id: id of the mask token.
        anchor: the token that is put in front.
        width: number of characters of the anchor's text.
    """

    GAP = "▒"

    def __init__(self, tokenize: Tokenize, detokenize: Detokenize, mask_token_id: int) -> None:
        self.detokenize = detokenize
        self.mask_token_id = mask_token_id
        self.anchor = tokenize("0")[-1:]
        self.width = len(detokenize(self.anchor))

    def inside(self, ids: Sequence[int]) -> str:
        """Text of successive tokens that are not at the start of a text."""
        return self.detokenize([*self.anchor, *ids])[self.width :]

    def partial(self, ids: Sequence[int]) -> str:
        """Text of a row, with a shaded box for each mask token."""
        text, run = "", []  # type: tuple[str, list[int]]
        for token in [*ids, self.mask_token_id]:
            if token != self.mask_token_id:
                run.append(token)
                continue
            if run:
                text += self.inside(run) if text else self.detokenize(run)
            run = []
            text += self.GAP
        return text.removesuffix(self.GAP)
