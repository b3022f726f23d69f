"""Encodes special tokens that the text of a conversation spells as ordinary text.

A chat template writes special tokens around the contents of messages. A tokenizer would also find
special tokens in the contents: a conversation about `<|im_end|>` would end there. Therefore, before
the template renders a row, a mark is put between the letters of each special token that a string of
the row spells. After rendering, the marked text is encoded as ordinary text without the marks.

Every other special token in the rendered text counts as the template's own. This includes special
tokens that the template builds from strings of the row: `<|{{ m.role }}|>` puts one together, and
`m.content | lower` makes one from `<|IM_END|>`. Templates do the former on purpose, and the
rendered text does not show the difference.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

# A Unicode noncharacter: it is reserved for internal use and is not part of any text.
MARK = "\ufdd0"


class SpecialTokens:
    """The special tokens of a tokenizer.

    Args:
        tokenizer: A `tokenizers.Tokenizer` that neither pads nor truncates. Its settings are
            changed, so no other code may use it.
        refused: Ids that no text may be encoded as.
    """

    def __init__(self, tokenizer: Any, refused: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._refused = frozenset(refused)
        tokens = [t for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        # The longest first: a regular expression takes the first alternative that matches.
        tokens.sort(key=lambda token: -len(token.content))
        self._ids = [tokenizer.token_to_id(token.content) for token in tokens]
        self._spelled = re.compile("|".join(re.escape(t.content) for t in tokens) or r"(?!)")
        # Some tokens include the white space beside them (lstrip, rstrip).
        forms = (
            rf"{r'\s*' if t.lstrip else ''}({re.escape(t.content)}){r'\s*' if t.rstrip else ''}"
            for t in tokens
        )
        self._found = re.compile("|".join(forms) or r"(?!)")
        self._normalize: Callable[[str], str] = lambda text: text
        if tokenizer.normalizer is not None and any(token.normalized for token in tokens):
            self._normalize = tokenizer.normalizer.normalize_str

    def spelled_in(self, text: str) -> bool:
        """Whether the tokenizer would find special tokens in a text."""
        return any(self._spelled.search(form) for form in (text, self._normalize(text)))

    def marked(self, text: str) -> str | None:
        """Puts marks into all special tokens that a text spells; None if one cannot be marked."""
        before = None
        while text != before:
            before = text
            text = self._spelled.sub(lambda found: MARK.join(found[0]), text)
        return None if self.spelled_in(text) else text

    def encode(self, text: str) -> list[int]:
        """Encodes a text with marks; marked special tokens become ordinary text.

        Raises:
            ValueError: The tokenizer cannot do this: it encodes the text between special tokens
                differently from the same text alone, or it encodes ordinary text as special tokens.
        """
        with_marks: list[int] = []
        with_text: list[int] = []
        start = 0
        for found in [*self._found.finditer(text), None]:
            piece = text[start : found.start() if found else None]
            with_marks += self._ids_of(piece, special=False)
            between = self._ids_of(piece.replace(MARK, ""), special=False)
            if not self._refused.isdisjoint(between):
                raise ValueError("it encodes text that spells a special token as that token")
            with_text += between
            if found:
                assert found.lastindex is not None  # every alternative is a group
                token = self._ids[found.lastindex - 1]
                with_marks.append(token)
                with_text.append(token)
                start = found.end()
        if with_marks != self._ids_of(text, special=True):
            raise ValueError("the row spells a special token, which it cannot encode as text here")
        return with_text

    def _ids_of(self, text: str, special: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not special
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def change_strings(value: Any, change: Callable[[str], Any]) -> Any:
    """Applies `change` to all strings of a JSON value, including keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [change_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): change_strings(item, change) for key, item in value.items()}
    return value


def strings_of(value: Any) -> list[str]:
    """Returns all strings of a JSON value, including keys."""
    found: list[str] = []

    def take(text: str) -> str:
        found.append(text)
        return text

    change_strings(value, take)
    return found
