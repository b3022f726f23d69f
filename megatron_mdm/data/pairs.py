"""Prompts and responses from JSONL, in worker processes."""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

from megatron_mdm.data.chat import TEMPLATE_DATE, ChatTemplate, Turns, template_digest
from megatron_mdm.data.documents import Document, document_object, string_value
from megatron_mdm.data.encoding import ChunkEncoder, EncodedChunk, TokenizerData, open_hugging_face
from megatron_mdm.data.special_tokens import MARK


@dataclasses.dataclass(frozen=True)
class PairKeys:
    """Where a JSONL line holds its pair.

    Either a prompt and a response under two keys, or, with `messages`, a conversation: a list of
    objects with `role` and `content`, the last one the assistant's. The chat template of the
    Hugging Face tokenizer in the directory `template` renders it, without the keys in `ignored` and
    with `date` for today's; `turns` says which answers become pairs. See `ChatTemplate`.
    """

    prompt: str = "prompt"
    response: str = "response"
    messages: str | None = None
    template: str | None = None
    ignored: tuple[str, ...] = ()
    date: datetime.date = TEMPLATE_DATE
    turns: Turns = "last"

    def options(self) -> dict[str, Any]:
        """What has an effect on the pairs, in JSON's types."""
        if self.messages is None:
            return {"prompt_key": self.prompt, "response_key": self.response}
        assert self.template is not None
        return {
            "messages_key": self.messages,
            "template": template_digest(self.template),
            "special_tokens_in_rows": "text",  # earlier versions made special tokens of it
            "ignore_keys": sorted(self.ignored),
            "template_date": self.date.isoformat(),
            # Earlier versions knew the last turn alone, and their data are the same.
            **({} if self.turns == "last" else {"turns": self.turns}),
        }


class PairEncoder(ChunkEncoder):
    """Maps lists of documents to `EncodedChunk`, two sequences a pair: prompt and response.

    Args:
        tokenizer: What to encode with.
        keys: Where the pair is.
        append_eod: Whether to end each response with `tokenizer.eod`, unless it does already.
        special: Whether text that spells a special token is that token. For conversations it
            always is, since a template writes special tokens. What a string of a row spells is
            text.
    """

    def __init__(
        self, tokenizer: TokenizerData, keys: PairKeys, append_eod: bool, special: bool = False
    ) -> None:
        super().__init__(tokenizer, "", append_eod, special or keys.messages is not None)
        self._keys = keys
        self._template = None
        self._spelling = 0
        if keys.messages is not None:
            assert keys.template is not None
            self._special = tokenizer.special_tokens()
            self._template = ChatTemplate(
                open_hugging_face(keys.template),
                keys.messages,
                self._special,
                keys.ignored,
                keys.date,
                keys.turns,
            )

    def __call__(self, documents: Sequence[Document]) -> EncodedChunk:
        """Encodes one chunk, which must not be empty."""
        self._spelling = 0
        chunk = super().__call__(documents)
        is_dated = self._template is not None and self._template.is_dated
        return chunk._replace(is_dated=is_dated, spelling=self._spelling)

    def prompt(self, document: Document) -> list[int]:
        """The ids of the prompt of a conversation whose last message is to be answered.

        Raises:
            BadDocumentError: See `ChatTemplate.prompt`.
        """
        assert self._template is not None
        text, has_marks = self._template.prompt(document)
        encode = self._special.encode if has_marks else self._encode
        (ids,) = self._ids(document, [text], encode)
        return ids

    def _encoded(self, document: Document) -> list[tuple[Sequence[str], list[list[int]]]]:
        if self._template is None:
            return super()._encoded(document)
        pairs = self._template.pairs(document)
        found: list[tuple[Sequence[str], list[list[int]]]] = []
        for *texts, has_marks in pairs:
            encode = self._special.encode if has_marks else self._encode
            sequences = self._ids(document, texts, encode)
            plain = [text.replace(MARK, "") for text in texts] if has_marks else texts
            found.append((plain, sequences))
        self._spelling += pairs[0].has_marks
        return found

    def _texts(self, document: Document) -> Sequence[str]:
        value = document_object(document)
        named = (("--prompt-key", self._keys.prompt), ("--response-key", self._keys.response))
        return [string_value(document, value, key, flag) for flag, key in named]
