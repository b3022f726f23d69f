"""Encodes prompts and responses from JSONL, in worker processes."""

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
    """The keys under which a JSONL line holds its prompt and response.

    A line holds either a prompt and a response under the keys `prompt` and `response`, or a
    conversation under the key `messages`: a list of objects with `role` and `content`, the last one
    the assistant's. The chat template of the Hugging Face tokenizer in the directory `template`
    renders a conversation, without the keys in `ignored` and with `date` for today's date. `turns`
    selects the answers that become pairs. See `ChatTemplate`.
    """

    prompt: str = "prompt"
    response: str = "response"
    messages: str | None = None
    template: str | None = None
    ignored: tuple[str, ...] = ()
    date: datetime.date = TEMPLATE_DATE
    turns: Turns = "last"

    def options(self) -> dict[str, Any]:
        """Returns all settings that have an effect on the pairs, as JSON values."""
        if self.messages is None:
            return {"prompt_key": self.prompt, "response_key": self.response}
        assert self.template is not None
        return {
            "messages_key": self.messages,
            "template": template_digest(self.template),
            "special_tokens_in_rows": "text",  # earlier versions encoded them as special tokens
            "ignore_keys": sorted(self.ignored),
            "template_date": self.date.isoformat(),
            # Absent for "last": earlier versions only had this setting and wrote no key for it.
            **({} if self.turns == "last" else {"turns": self.turns}),
        }


class PairEncoder(ChunkEncoder):
    """Maps lists of documents to `EncodedChunk`; each pair is two sequences, prompt and response.

    Args:
        tokenizer: The tokenizer.
        keys: The keys of the pair.
        append_eod: Whether to append `tokenizer.eod` to each response that does not end with it.
        special: Whether text that spells a special token is encoded as that token. Always True
            for conversations, since a template writes special tokens; a special token that a
            string of the row spells is still encoded as text.
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
        """Encodes the prompt of a conversation whose last message is to be answered.

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
