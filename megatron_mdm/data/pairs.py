"""Prompts and responses from JSONL, in worker processes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_mdm.data.documents import Document, bad_document, document_object, string_value
from megatron_mdm.data.encoding import ChunkEncoder, TokenizerData, open_hugging_face


@dataclasses.dataclass(frozen=True)
class PairKeys:
    """Where a JSONL line holds its pair.

    Either a prompt and a response under two keys, or, with `messages`, a conversation: a list of
    objects with `role` and `content`, the last one the assistant's. The chat template of the
    Hugging Face tokenizer in the directory `template` renders it; what the last message adds to
    the rendered others, with the header of an answer after them, is the response.
    """

    prompt: str = "prompt"
    response: str = "response"
    messages: str | None = None
    template: str | None = None


class PairEncoder(ChunkEncoder):
    """Maps lists of documents to `EncodedChunk`, two sequences a document: prompt and response.

    Args:
        tokenizer: What to encode with.
        keys: Where the pair is.
        append_eod: Whether to end each response with `tokenizer.eod`, unless it does already.
    """

    def __init__(self, tokenizer: TokenizerData, keys: PairKeys, append_eod: bool) -> None:
        super().__init__(tokenizer, "", append_eod)
        self._keys = keys
        if keys.messages is not None:
            # A template writes special tokens, which must not be taken for text.
            self._encode = tokenizer.load(special=True)
            renderer = open_hugging_face(keys.template)
            self._template = renderer.apply_chat_template
            self._end = renderer.eos_token

    def _texts(self, document: Document) -> Sequence[str]:
        keys = self._keys
        value = document_object(document)
        if keys.messages is None:
            named = (("--prompt-key", keys.prompt), ("--response-key", keys.response))
            return [string_value(document, value, key, flag) for flag, key in named]
        return self._render(document, value)

    def _render(self, document: Document, value: dict[str, Any]) -> Sequence[str]:
        key = self._keys.messages
        messages = value.get(key)
        if not isinstance(messages, list) or not messages:
            raise bad_document(document, f'no list of messages under "{key}" (see --messages-key)')
        for message in messages:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise bad_document(document, f'a message of "{key}" without role and content')
        if messages[-1]["role"] != "assistant":
            raise bad_document(document, f'the last message of "{key}" is not the assistant\'s')
        try:
            prompt = self._template(messages[:-1], tokenize=False, add_generation_prompt=True)
            whole = self._template(messages, tokenize=False)
            tail = ""
            if self._template(messages[:-1], tokenize=False) == prompt:
                tail = self._tail(messages, whole)
        except Exception as error:  # whatever a template raises, in a language of its own
            raise bad_document(document, f"the chat template refuses it: {error}") from error
        if tail is None:
            raise bad_document(
                document,
                "the chat template ignores add_generation_prompt, and what it appends to the last "
                "answer cannot be told from it: give prompt and response as texts instead",
            )
        whole = whole.removesuffix(tail)
        if not whole.startswith(prompt):
            raise bad_document(
                document,
                "the chat template renders the conversation differently without its last message: "
                "give prompt and response as texts instead",
            )
        response = whole[len(prompt) :]
        # Some templates go on to the next line after the end of every message (Qwen's).
        if self._end and response.rstrip().endswith(self._end):
            response = response.rstrip()
        return prompt, response

    def _tail(self, messages: list[Any], whole: str) -> str | None:
        """What the template appends to every conversation, whatever it is asked for.

        LLaDA's appends the header of another answer, with which a response must not end. It is
        what stands there without any message.

        Args:
            messages: The conversation.
            whole: What the template renders it as.

        Returns:
            None if it cannot be found.
        """
        continued = self._template([*messages, {"role": "user", "content": "x"}], tokenize=False)
        if continued.startswith(whole):
            return ""
        try:
            (tail,) = self._template([[]], tokenize=False)  # a batch: one alone may not be empty
        except Exception:  # of a template that looks at the first message
            return None
        is_tail = whole.endswith(tail) and continued.startswith(whole.removesuffix(tail))
        return tail if is_tail else None
