"""Ids, fingerprint and chat template of a Megatron tokenizer, which wraps a library's tokenizer."""

import datetime
import functools
from dataclasses import dataclass
from typing import Any

from megatron_mdm.data.chat import TEMPLATE_DATE, undated
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
        date: the date that the template gets for today's date.
    """

    tokenizer: Any
    date: datetime.date = TEMPLATE_DATE

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
        return undated(self.tokenizer.get_chat_template(), self.date)

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """A conversation as one text.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: whether the header of an answer follows the messages. If not,
                the last message is an answer that the text leaves open.

        Raises:
            UserError: the template refuses the conversation, or no template is named default.
        """
        return self._applied(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def answer_end_id(self) -> int | None:
        """The first special token that the template writes after an answer; None if unknown.

        It need not be the tokenizer's end of document: LLaDA's template ends answers with another
        token.
        """
        question, answer = {"role": "user", "content": "Why?"}, "Because."
        try:
            text = self._applied([question, {"role": "assistant", "content": answer}])
        except UserError:
            return None  # the template is for other conversations, or there are several
        _, found, tail = text.rpartition(answer)
        special = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        ids = self.tokenizer.encode(tail if found else "", add_special_tokens=False)
        return next((i for i in ids if i in special), None)

    def _applied(self, messages: list[dict[str, str]], **settings: bool) -> str:
        """A conversation as one text, with these settings of apply_chat_template.

        Raises:
            UserError: see `render`.
        """
        template = self.template
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, **settings
            )
        except Exception as error:  # templates are programs and may raise anything
            reason = " ".join(str(error).split())
            raise UserError(f"the chat template refuses a conversation: {reason}") from error
        return text


def chat_template(tokenizer: Any, date: datetime.date = TEMPLATE_DATE) -> Chat | None:
    """The chat template of a Hugging Face tokenizer; None if there is none.

    Args:
        tokenizer: Megatron's tokenizer.
        date: the date that the template gets for today's date.
    """
    inner = _of_library(tokenizer)
    return Chat(inner, date) if getattr(inner, "chat_template", None) else None


def _wrapped(tokenizer: Any) -> Any:
    """Megatron's wrapper of the library's tokenizer, which its text tokenizer contains."""
    return tokenizer._tokenizer if hasattr(tokenizer, "_tokenizer") else tokenizer


def _of_library(tokenizer: Any) -> Any:
    """The library's own tokenizer; None if there is none."""
    return getattr(_wrapped(tokenizer), "tokenizer", None)
