"""Prompts and responses from JSONL, in worker processes."""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

from megatron_mdm.data.chat import TEMPLATE_DATE, ChatTemplate, template_digest
from megatron_mdm.data.documents import Document, document_object, string_value
from megatron_mdm.data.encoding import ChunkEncoder, EncodedChunk, TokenizerData


@dataclasses.dataclass(frozen=True)
class PairKeys:
    """Where a JSONL line holds its pair.

    Either a prompt and a response under two keys, or, with `messages`, a conversation: a list of
    objects with `role` and `content`, the last one the assistant's. The chat template of the
    Hugging Face tokenizer in the directory `template` renders it, without the keys in `ignored` and
    with `date` for today's; see `ChatTemplate`.
    """

    prompt: str = "prompt"
    response: str = "response"
    messages: str | None = None
    template: str | None = None
    ignored: tuple[str, ...] = ()
    date: datetime.date = TEMPLATE_DATE

    def options(self) -> dict[str, Any]:
        """What has an effect on the pairs, in JSON's types."""
        if self.messages is None:
            return {"prompt_key": self.prompt, "response_key": self.response}
        return {
            "messages_key": self.messages,
            "template": template_digest(self.template),
            "ignore_keys": sorted(self.ignored),
            "template_date": self.date.isoformat(),
        }


class PairEncoder(ChunkEncoder):
    """Maps lists of documents to `EncodedChunk`, two sequences a document: prompt and response.

    Args:
        tokenizer: What to encode with.
        keys: Where the pair is.
        append_eod: Whether to end each response with `tokenizer.eod`, unless it does already.
        special: Whether text that spells a special token is that token. For conversations it
            always is, since a template writes special tokens.
    """

    def __init__(
        self, tokenizer: TokenizerData, keys: PairKeys, append_eod: bool, special: bool = False
    ) -> None:
        super().__init__(tokenizer, "", append_eod, special or keys.messages is not None)
        self._keys = keys
        self._template = None
        if keys.messages is not None:
            self._template = ChatTemplate(keys.template, keys.messages, keys.ignored, keys.date)

    def __call__(self, documents: Sequence[Document]) -> EncodedChunk:
        """Encodes one chunk, which must not be empty."""
        chunk = super().__call__(documents)
        return chunk._replace(is_dated=self._template is not None and self._template.is_dated)

    def _texts(self, document: Document) -> Sequence[str]:
        if self._template is not None:
            return self._template.pair(document)
        value = document_object(document)
        named = (("--prompt-key", self._keys.prompt), ("--response-key", self._keys.response))
        return [string_value(document, value, key, flag) for flag, key in named]
