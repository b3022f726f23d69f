"""Conversations as prompts and responses, rendered by a chat template, in worker processes.

Whatever a row says has to reach what is trained, or the row is refused: content that is no text, a
key that the template does not look at, a role that it leaves out. Keys that are to be left out are
named on the command line. A null value says nothing, and is passed over. A special token that
a string of a row spells stays text; see `megatron_mdm.data.special_tokens`.

A template that asks for today's date gets a fixed one, so that the same rows are the same tokens on
every day.
"""

import datetime
import functools
import inspect
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from megatron_mdm.data.documents import (
    Document,
    bad_document,
    check_surrogates,
    document_object,
    json_type,
)
from megatron_mdm.data.encoding import open_hugging_face
from megatron_mdm.data.record import digest
from megatron_mdm.data.special_tokens import MARK, SpecialTokens, change_strings, strings_of

Message = dict[str, Any]
# What Llama 3.1's template writes where it cannot ask for today's date.
TEMPLATE_DATE = datetime.date(2024, 7, 26)
ASKS_FOR_DATE = "strftime_now"
# Values that a template may well render as it renders none.
EMPTY: tuple[Any, ...] = ("", [], {})
# Arguments of apply_chat_template that a row may give.
GIVEN_BY_ROWS = {"tools", "documents"}
# Roles that every template renders.
SPEAKERS = {"user", "assistant"}
_IGNORE_KEYS = "--ignore-keys leaves out the keys that it names"


class Pair(NamedTuple):
    """A conversation as a template renders it.

    Attributes:
        prompt: All but the last message, and the header of an answer.
        response: What the last message adds to it.
        has_marks: Whether special tokens that the row spells have marks in both texts, see
            `megatron_mdm.data.special_tokens`.
    """

    prompt: str
    response: str
    has_marks: bool = False


class ChatTemplate:
    """Splits conversations before their last message, the assistant's.

    A row is an object with a list of messages, each with `role` and `content`. Its other keys are
    variables of the template.

    Args:
        directory: Of a Hugging Face tokenizer with a chat template.
        key: Where a row holds its messages.
        special: The special tokens of this tokenizer.
        ignored: Keys of rows, messages and their parts that are left out.
        date: What the template gets for today's date.

    Attributes:
        is_dated: Whether the date stands in a pair that was rendered.
    """

    def __init__(
        self,
        directory: str,
        key: str,
        special: SpecialTokens,
        ignored: Collection[str] = (),
        date: datetime.date = TEMPLATE_DATE,
    ) -> None:
        tokenizer = open_hugging_face(directory)
        self.is_dated = False
        self._date = date
        self._template = tokenizer.get_chat_template
        self._apply = tokenizer.apply_chat_template
        self._end = tokenizer.eos_token
        self._key = key
        self._special = special
        self._ignored = set(ignored)
        arguments = set(inspect.signature(tokenizer.apply_chat_template).parameters)
        self._unavailable = {"messages", *arguments} - GIVEN_BY_ROWS

    def pair(self, document: Document) -> Pair:
        """The prompt and the response of a row.

        What the last message adds to the rendered others, with the header of an answer after them,
        is the response.

        Raises:
            BadDocumentError: The row is no conversation, the template refuses it or leaves out a
                part of it, the response cannot be told from the prompt, or a special token that the
                row spells cannot stay text.
        """
        messages, variables = self._read(document)
        has_marks = any(map(self._special.spelled_in, strings_of([messages, variables])))
        if has_marks:
            messages, variables = self._marked(document, messages, variables)
        silent = [n for n, message in enumerate(messages) if message["content"] is None]
        try:
            messages = self._without_none(messages, variables)
            prompt = self._render(messages[:-1], variables, add_generation_prompt=True)
            whole = self._render(messages, variables)
            tail: str | None = ""
            if self._render(messages[:-1], variables) == prompt:
                tail = self._tail(messages, variables, whole)
        except Exception as error:  # whatever a template raises, in a language of its own
            reason = " ".join(str(error).split())
            raise bad_document(document, f"the chat template refuses it: {reason}") from error
        if has_marks:
            self._check_unmarked(document, messages, variables, prompt, whole)
        for n in silent:
            bare = {"role": messages[n]["role"], "content": messages[n]["content"]}
            if self._rendered([*messages[:n], bare, *messages[n + 1 :]], variables) == whole:
                raise bad_document(
                    document,
                    f'message {n + 1} of "{self._key}" has no content, and no other key that the '
                    "chat template renders",
                )
        if idle := dict(self._without_effect(messages, variables, whole)):
            raise bad_document(
                document,
                f"the chat template renders the same without {', '.join(idle)}: "
                f"{', and '.join(dict.fromkeys(idle.values()))}",
            )
        if tail is None:
            raise bad_document(
                document,
                "the chat template ignores add_generation_prompt, and what it appends to the last "
                "answer cannot be told from it: give prompt and response as texts instead",
            )
        rendered, whole = whole, whole.removesuffix(tail)
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
        if not self.is_dated and ASKS_FOR_DATE in self._template(tools=variables.get("tools")):
            self.is_dated = self._rendered(messages, variables, write_date=_no_date) != rendered
        return Pair(prompt, response, has_marks)

    def _marked(
        self, document: Document, messages: list[Message], variables: dict[str, Any]
    ) -> tuple[list[Message], dict[str, Any]]:
        """A row with marks in the special tokens that it spells."""
        strings = strings_of([messages, variables])
        if any(MARK in text or self._special.marked(text) is None for text in strings):
            raise bad_document(
                document, "it spells a special token of the tokenizer, and that cannot stay text"
            )
        marked = change_strings([messages, variables], self._special.marked)
        return marked[0], marked[1]

    def _check_unmarked(
        self,
        document: Document,
        messages: list[Message],
        variables: dict[str, Any],
        prompt: str,
        whole: str,
    ) -> None:
        """Checks that the template renders a row as it would without the marks, but for these."""
        messages, variables = change_strings(
            [messages, variables], lambda text: text.replace(MARK, "")
        )
        rendered = (
            self._rendered(messages[:-1], variables, add_generation_prompt=True),
            self._rendered(messages, variables),
        )
        if rendered != (prompt.replace(MARK, ""), whole.replace(MARK, "")):
            raise bad_document(
                document,
                "it spells a special token of the tokenizer, and that cannot stay text: the chat "
                "template looks for it, or changes it",
            )

    def _read(self, document: Document) -> tuple[list[Message], dict[str, Any]]:
        """The messages of a row, the content of each a text or None, and its other keys."""
        row = document_object(document)
        messages = row.get(self._key)
        if not isinstance(messages, list) or not messages:
            raise bad_document(
                document, f'no list of messages under "{self._key}" (see --messages-key)'
            )
        read = []
        for number, message in enumerate(messages, 1):
            name = f'message {number} of "{self._key}"'
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise bad_document(document, f"{name} has no role")
            content = message.get("content")
            if content is not None:
                content = self._text(document, name, content)
            read.append({**self._kept(message), "content": content})
        if read[-1]["role"] != "assistant":
            raise bad_document(
                document, f'the last message of "{self._key}" is not the assistant\'s'
            )
        variables = {k: v for k, v in self._kept(row).items() if k != self._key}
        check_surrogates(document, json.dumps([read, variables], ensure_ascii=False))
        return read, variables

    def _kept(self, value: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in value.items() if k not in self._ignored and v is not None}

    def _text(self, document: Document, name: str, content: Any) -> str:
        """The text of a message, whose content may be a list of parts of text."""
        if isinstance(content, str):
            return content
        parts = content if type(content) is list else []
        texts = [text for text in map(self._text_of_part, parts) if text is not None]
        if not texts or len(texts) < len(parts):
            raise bad_document(
                document,
                f"the content of {name} is a JSON {json_type(content)} that is no text: give a "
                'string, or a list of {"type": "text", "text": ...}',
            )
        return "".join(texts)

    def _text_of_part(self, part: Any) -> str | None:
        """The text of a part, None if it is something else, or more."""
        part = self._kept(part) if isinstance(part, dict) else {}
        is_text = part.keys() == {"type", "text"} and part["type"] == "text"
        return part["text"] if is_text and isinstance(part["text"], str) else None

    def _render(
        self,
        messages: list[Message],
        variables: dict[str, Any],
        add_generation_prompt: bool = False,
        write_date: Callable[[str], str] | None = None,
    ) -> str:
        available = {k: v for k, v in variables.items() if k not in self._unavailable}
        template = self._template(tools=available.get("tools"))
        rendered: str = self._apply(
            messages,
            chat_template=_with_date(template, write_date or self._date.strftime),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **available,
        )
        return rendered

    def _rendered(
        self, messages: list[Message], variables: dict[str, Any], **options: Any
    ) -> str | None:
        """What the template makes of a conversation, None where it raises."""
        try:
            return self._render(messages, variables, **options)
        except Exception:  # of any kind, see `pair`
            return None

    def _without_none(self, messages: list[Message], variables: dict[str, Any]) -> list[Message]:
        """The messages with empty texts for null content, if the template cannot do with null.

        Some templates look for null before they render tool calls; others would write "None".
        """
        texts = [{**m, "content": "" if m["content"] is None else m["content"]} for m in messages]
        if texts == messages:
            return messages
        null, text = self._rendered(messages, variables), self._rendered(texts, variables)
        if null is None or (text is not None and null.count("None") > text.count("None")):
            return texts
        return messages

    def _without_effect(
        self, messages: list[Message], variables: dict[str, Any], whole: str
    ) -> Iterator[tuple[str, str]]:
        """Names what a row says and the template does not render, and how to leave it out.

        Nothing changes where it is left out, nor where it says something else: a template may put
        the same in its place by itself (Qwen2's system prompt). A key of messages may be without
        effect in some of them: templates leave out the reasoning of earlier answers.

        Args:
            messages: Of the row.
            variables: Its other keys.
            whole: What the template renders it as.
        """

        def is_idle(*conversations: tuple[list[Message], dict[str, Any]]) -> bool:
            return all(self._rendered(*conversation) == whole for conversation in conversations)

        for key in [key for key, value in variables.items() if value not in EMPTY]:
            others = {k: v for k, v in variables.items() if k != key}
            changed = {**variables, key: _another(variables[key])}
            if is_idle((messages, others), (messages, changed)):
                yield f'the key "{key}"', _IGNORE_KEYS
        used = {k: None for m in messages for k, value in m.items() if value not in EMPTY}
        for key in [key for key in used if key not in ("role", "content")]:
            shorter = [{k: v for k, v in m.items() if k != key} for m in messages]
            other = [{k: _another(v) if k == key else v for k, v in m.items()} for m in messages]
            if is_idle((shorter, variables), (other, variables)):
                yield f'the key "{key}" of messages', _IGNORE_KEYS
        roles = {message["role"]: None for message in messages if message["content"]}
        for role in [role for role in roles if role not in SPEAKERS]:
            fewer = [m for m in messages if m["role"] != role]
            other = [
                {**m, "content": _another(m["content"])} if m["role"] == role else m
                for m in messages
            ]
            if is_idle((fewer, variables), (other, variables)):
                yield f'the messages of the role "{role}"', "take these messages out of the file"

    def _tail(self, messages: list[Message], variables: dict[str, Any], whole: str) -> str | None:
        """What the template appends to every conversation, whatever it is asked for.

        LLaDA's appends the header of another answer, with which a response must not end. It is
        what stands there without any message.

        Args:
            messages: The conversation.
            variables: The other keys of its row.
            whole: What the template renders it as.

        Returns:
            None if it cannot be found.
        """
        continued = self._render([*messages, {"role": "user", "content": "x"}], variables)
        if continued.startswith(whole):
            return ""
        # A batch of one, since a conversation alone may not be empty; rendered, it is one of texts.
        batch: Any = [[]]
        texts: Any = self._rendered(batch, variables)
        if texts is None:  # of a template that looks at the first message
            return None
        (tail,) = texts
        is_tail = whole.endswith(tail) and continued.startswith(whole.removesuffix(tail))
        return tail if is_tail else None


def template_digest(directory: str) -> str:
    """A digest of the chat template of a Hugging Face tokenizer, and of the tokens that it writes.

    Args:
        directory: Of the tokenizer.
    """
    tokenizer = open_hugging_face(directory)
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest([tokenizer.chat_template, tokens])


def undated(template: str) -> str:
    """A chat template that writes the date of `TEMPLATE_DATE` for today's."""
    return _with_date(template, TEMPLATE_DATE.strftime)


def _another(value: Any) -> Any:
    """A value of the same kind that says something else; lists and objects stay as they are."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value} probe" if isinstance(value, str) else value


@functools.cache
def _with_date(template: str, write_date: Callable[[str], str]) -> str:
    """A template in which `strftime_now` writes another date than today's.

    A variable of that name would not do: transformers takes plain values only.

    Args:
        template: A chat template.
        write_date: Format -> the date, as `datetime.date.strftime`.
    """
    if ASKS_FOR_DATE not in template:
        return template
    import jinja2

    tokens = jinja2.Environment().lex(template)
    strings = [text[1:-1] for _, kind, text in tokens if kind == "string" and "%" in text]
    # As jinja reads them.
    formats = [s.encode("ascii", "backslashreplace").decode("unicode-escape") for s in strings]
    dates = json.dumps({text: write_date(text) for text in formats})
    return (
        f"{{% macro strftime_now(format) %}}{{% set dates = {dates} %}}"
        "{% if format in dates %}{{ dates[format] }}{% else %}"
        "{{ raise_exception('strftime_now(' ~ format ~ '): write the format out there') }}"
        # The end of the line goes away, and the template begins a line as it did.
        "{% endif %}{% endmacro %}\n" + template
    )


def _no_date(_format: str) -> str:
    return ""
