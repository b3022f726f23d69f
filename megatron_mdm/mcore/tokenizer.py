"""Ids, fingerprint and chat template of a Megatron tokenizer, which wraps a library's tokenizer."""

import functools
from dataclasses import dataclass
from typing import Any

from megatron_mdm.data.chat import undated
from megatron_mdm.data.encoding import (
    TokenizerData,
    hugging_face_data,
    mask_id,
    sentencepiece_data,
)
from megatron_mdm.data.fingerprint import Fingerprint
from megatron_mdm.errors import UserError


def tokenizer_rows(tokenizer: Any) -> int:
    """One more than the largest token id. Some of the smaller ids may name no token."""
    inner = _of_library(tokenizer)
    ids = inner.get_vocab().values() if hasattr(inner, "get_vocab") else ()
    return max(int(tokenizer.vocab_size), 1 + max(ids, default=0))


def tokenizer_end_id(tokenizer: Any) -> int | None:
    """The id of the end-of-document token; None if the tokenizer has none."""
    eod = tokenizer.eod
    return None if eod is None or eod < 0 else int(eod)  # sentencepiece uses -1 for none


def tokenizer_mask_id(tokenizer: Any) -> int | None:
    """The id of the mask token; None if the tokenizer has none."""
    return mask_id(_of_library(tokenizer))


def tokenizer_data(tokenizer: Any) -> TokenizerData | Fingerprint | None:
    """The tokenizer in the form that preprocessing uses.

    Returns:
        A fingerprint for a tokenizer without text (NullTokenizer); None for a kind that
        preprocessing does not support.
    """
    inner = _of_library(tokenizer)
    if getattr(inner, "is_fast", False):
        return hugging_face_data(inner)
    if hasattr(inner, "serialized_model_proto"):
        return sentencepiece_data(inner)
    if type(_wrapped(tokenizer)).__name__ == "NullTokenizer":
        return Fingerprint("NullTokenizer", int(tokenizer.vocab_size), tokenizer.eod)
    return None


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template.

    Attributes:
        tokenizer: a Hugging Face tokenizer, with one template or several named ones.
    """

    tokenizer: Any

    @functools.cached_property
    def template(self) -> str:
        """The Jinja template, changed so that it writes the same date on every day.

        Raises:
            UserError: there are several templates, and none is named default.
        """
        named = self.tokenizer.chat_template
        if isinstance(named, dict) and "default" not in named:
            raise UserError(
                f"the tokenizer has the chat templates {', '.join(sorted(named))} and none named "
                "default, but only the default template is applied: rename one of them to default "
                "in the tokenizer's directory, or drop --apply-chat-template"
            )
        return undated(self.tokenizer.get_chat_template())

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """A conversation as one text.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: whether the header of an answer follows the messages. If not,
                the last message is an answer that the text leaves open.

        Raises:
            UserError: the template refuses the conversation, or no template is named default.
        """
        template = self.template
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # templates are programs and may raise anything
            reason = " ".join(str(error).split())
            raise UserError(f"the chat template refuses a conversation: {reason}") from error
        return text


def chat_template(tokenizer: Any) -> Chat | None:
    """The chat template of a Hugging Face tokenizer; None if there is none."""
    inner = _of_library(tokenizer)
    return Chat(inner) if getattr(inner, "chat_template", None) else None


def _wrapped(tokenizer: Any) -> Any:
    """Megatron's wrapper of the library's tokenizer, which its text tokenizer contains."""
    return tokenizer._tokenizer if hasattr(tokenizer, "_tokenizer") else tokenizer


def _of_library(tokenizer: Any) -> Any:
    """The library's own tokenizer; None if there is none."""
    return getattr(_wrapped(tokenizer), "tokenizer", None)
