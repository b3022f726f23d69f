"""Turns conversations into prompts and responses with a chat template, in worker processes.

Everything in a row has to reach the rendered text, or the row is refused. So a row is refused if
its content is not text, if the template ignores one of its keys, or if the template leaves out a
role. The command line names the keys to leave out (--ignore-keys). Null values are ignored. If a
string of a row spells a special token, it is encoded as text; see
`megatron_mdm.data.special_tokens`.

A template that asks for today's date gets a fixed date, so that the same rows give the same tokens
every day.
"""

import datetime
import functools
import inspect
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

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
Turns = Literal["last", "every"]
# The date that Llama 3.1's template writes if it cannot ask for today's date.
TEMPLATE_DATE = datetime.date(2024, 7, 26)
ASKS_FOR_DATE = "strftime_now"
# Empty values: a template may render them as it renders a missing key.
EMPTY: tuple[Any, ...] = ("", [], {})
# Arguments of apply_chat_template that a row may set.
GIVEN_BY_ROWS = {"tools", "documents"}
# Roles that every template renders.
SPEAKERS = {"user", "assistant"}
# Roles that an assistant does not answer.
INSTRUCTIONS = {"system", "developer"}
_IGNORE_KEYS = "--ignore-keys leaves out the keys that it names"


class Pair(NamedTuple):
    """A turn of the assistant, rendered by a template.

    Attributes:
        prompt: All messages before the answer, and the header of an answer.
        response: The text that the answer adds to the prompt.
        has_marks: Whether special tokens that the row spells have marks in both texts, see
            `megatron_mdm.data.special_tokens`.
    """

    prompt: str
    response: str
    has_marks: bool = False


class Turn(NamedTuple):
    """A conversation up to an answer of the assistant.

    Attributes:
        messages: The messages; the answer is the last one.
        prompt: As in `Pair`.
        whole: The rendered conversation.
        tail: The text that the template appends to every conversation; None if it cannot be found.
    """

    messages: list[Message]
    prompt: str
    whole: str
    tail: str | None


class Rendering(NamedTuple):
    """The rendered text of the first messages of a row, or of all of them.

    Attributes:
        messages: The messages.
        text: The rendered text.
        asked: Whether the text ends with the header of an answer (add_generation_prompt).
    """

    messages: list[Message]
    text: str
    asked: bool = False


class ChatTemplate:
    """Splits conversations into prompts and answers of the assistant.

    A row is an object with a list of messages, each with `role` and `content`. The other keys of
    the row are variables of the template.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        key: The key of a row's messages.
        special: The special tokens of this tokenizer.
        ignored: Keys of rows, messages and their parts that are left out.
        date: The date that the template gets for today's date.
        turns: Which answers become pairs: "last", the last message; "every", every answer to a
            message, each as if the conversation ended with it.

    Attributes:
        is_dated: Whether a rendered pair contains the date.
    """

    def __init__(
        self,
        tokenizer: Any,
        key: str,
        special: SpecialTokens,
        ignored: Collection[str] = (),
        date: datetime.date = TEMPLATE_DATE,
        turns: Turns = "last",
    ) -> None:
        self.is_dated = False
        self._date = date
        self._turns = turns
        self._template = tokenizer.get_chat_template
        self._apply = tokenizer.apply_chat_template
        self._end = tokenizer.eos_token
        self._key = key
        self._special = special
        self._ignored = set(ignored)
        arguments = set(inspect.signature(tokenizer.apply_chat_template).parameters)
        self._unavailable = {"messages", *arguments} - GIVEN_BY_ROWS

    def pairs(self, document: Document) -> list[Pair]:
        """Makes the prompt and the response of each turn of a row that is to be learned.

        The prompt is the rendered text of the messages before an answer, with the header of an
        answer. The response is the rest of the rendered text with the answer.

        Raises:
            BadDocumentError: The row is not a conversation, the template refuses it or leaves out a
                part of it, a response cannot be separated from its prompt, or a special token that
                the row spells cannot be encoded as text.
        """
        messages, variables, has_marks = self._opened(document)
        if messages[-1]["role"] != "assistant":
            raise bad_document(
                document, f'the last message of "{self._key}" is not the assistant\'s'
            )
        filled = self._without_none(messages, variables)
        ends = self._ends(filled)
        turns = [self._turn(document, filled[:end], variables) for end in ends]
        rendered = [Rendering(turn.messages, turn.whole) for turn in reversed(turns)]
        rendered += [Rendering(turn.messages[:-1], turn.prompt, asked=True) for turn in turns]
        self._check(document, messages, variables, rendered, has_marks)
        pairs = [
            Pair(turn.prompt, self._response(document, turn, end), has_marks)
            for turn, end in zip(turns, ends, strict=True)
        ]
        if not self.is_dated and ASKS_FOR_DATE in self._template(tools=variables.get("tools")):
            self.is_dated = any(
                self._rendered(turn.messages, variables, write_date=_no_date) != turn.whole
                for turn in turns
            )
        return pairs

    def prompt(self, document: Document) -> tuple[str, bool]:
        """Makes the prompt of a row whose last message is to be answered, as `pairs` would.

        Returns:
            The prompt, and whether it has marks, see `Pair`.

        Raises:
            BadDocumentError: As in `pairs`; also if the last message is an answer.
        """
        messages, variables, has_marks = self._opened(document)
        if messages[-1]["role"] == "assistant":
            raise bad_document(
                document, f'the last message of "{self._key}" is the assistant\'s: leave it out'
            )
        filled = self._without_none(messages, variables)
        with _refusal(document):
            prompt = self._render(filled, variables, add_generation_prompt=True)
        rendered = [Rendering(filled, prompt, asked=True)]
        self._check(document, messages, variables, rendered, has_marks)
        return prompt, has_marks

    def _opened(self, document: Document) -> tuple[list[Message], dict[str, Any], bool]:
        """Reads a row; returns messages and other keys, with marks, and whether there are marks."""
        messages, variables = self._read(document)
        has_marks = any(map(self._special.spelled_in, strings_of([messages, variables])))
        if has_marks:
            messages, variables = self._marked(document, messages, variables)
        return messages, variables, has_marks

    def _ends(self, messages: list[Message]) -> list[int]:
        """Returns, for each turn to be learned, the number of messages up to its end."""
        if self._turns == "last":
            return [len(messages)]
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        # A greeting answers no message. Like the instructions before it, it is only context.
        spoken = INSTRUCTIONS | {"assistant"}
        asked = [n for n in answers if any(m["role"] not in spoken for m in messages[:n])]
        return [n + 1 for n in asked or answers[-1:]]

    def _turn(self, document: Document, messages: list[Message], variables: dict[str, Any]) -> Turn:
        """Renders a conversation that ends with an answer."""
        with _refusal(document):
            prompt = self._render(messages[:-1], variables, add_generation_prompt=True)
            whole = self._render(messages, variables)
            tail: str | None = ""
            if self._render(messages[:-1], variables) == prompt:
                tail = self._tail(messages, variables, whole)
        return Turn(messages, prompt, whole, tail)

    def _response(self, document: Document, turn: Turn, end: int) -> str:
        """Returns the text that an answer, message number `end` of its row, adds to its prompt."""
        if turn.tail is None:
            raise bad_document(
                document,
                "the chat template ignores add_generation_prompt, and the text that it appends to "
                "the last answer cannot be found: give prompt and response as texts instead",
            )
        whole = turn.whole.removesuffix(turn.tail)
        if not whole.startswith(turn.prompt):
            last = self._turns == "last"
            message = "its last message" if last else f"message {end}, an answer"
            raise bad_document(
                document,
                f"the chat template renders the conversation differently without {message}: give "
                f"prompt and response as texts instead{'' if last else ', or take --turns last'}",
            )
        response = whole[len(turn.prompt) :]
        # Some templates (Qwen's) start a new line after the end of every message.
        if self._end and response.rstrip().endswith(self._end):
            response = response.rstrip()
        return response

    def _check(
        self,
        document: Document,
        messages: list[Message],
        variables: dict[str, Any],
        rendered: list[Rendering],
        has_marks: bool,
    ) -> None:
        """Checks that the template renders all of a row, and special tokens in it as text.

        Args:
            document: The row.
            messages: Messages of the row, with content None if a message has no content.
            variables: Keys of the row other than its messages.
            rendered: All texts that were rendered from the row; that of all messages first.
            has_marks: Whether special tokens that the row spells have marks.
        """
        if has_marks:
            for rendering in rendered:
                self._check_unmarked(document, variables, rendering)
        self._check_contents(document, messages, variables, rendered[0])
        self._check_effects(document, variables, rendered)

    def _check_contents(
        self,
        document: Document,
        messages: list[Message],
        variables: dict[str, Any],
        rendering: Rendering,
    ) -> None:
        """Checks that every message without content has another key that is rendered."""
        filled, text, asked = rendering
        for n in (n for n, message in enumerate(messages) if message["content"] is None):
            bare = {"role": filled[n]["role"], "content": filled[n]["content"]}
            others = [*filled[:n], bare, *filled[n + 1 :]]
            if self._rendered(others, variables, add_generation_prompt=asked) == text:
                raise bad_document(
                    document,
                    f'message {n + 1} of "{self._key}" has no content, and no other key that the '
                    "chat template renders",
                )

    def _check_effects(
        self,
        document: Document,
        variables: dict[str, Any],
        conversations: list[Rendering],
    ) -> None:
        """Checks that each key and role changes at least one of the rendered conversations."""
        idle = dict(self._without_effect(variables, conversations))
        if idle:
            raise bad_document(
                document,
                f"the chat template renders the same without {', '.join(idle)}: "
                f"{', and '.join(dict.fromkeys(idle.values()))}",
            )

    def _marked(
        self, document: Document, messages: list[Message], variables: dict[str, Any]
    ) -> tuple[list[Message], dict[str, Any]]:
        """Puts marks into the special tokens that a row spells."""
        strings = strings_of([messages, variables])
        if any(MARK in text or self._special.marked(text) is None for text in strings):
            raise bad_document(
                document,
                "it spells a special token of the tokenizer, which cannot be encoded as text",
            )
        marked = change_strings([messages, variables], self._special.marked)
        return marked[0], marked[1]

    def _check_unmarked(
        self,
        document: Document,
        variables: dict[str, Any],
        rendering: Rendering,
    ) -> None:
        """Checks that a template renders the same text with and without the marks."""
        messages, variables, text = change_strings(
            [rendering.messages, variables, rendering.text], lambda string: string.replace(MARK, "")
        )
        if self._rendered(messages, variables, add_generation_prompt=rendering.asked) != text:
            raise bad_document(
                document,
                "it spells a special token of the tokenizer, which cannot be encoded as text: the "
                "chat template looks for it, or changes it",
            )

    def _read(self, document: Document) -> tuple[list[Message], dict[str, Any]]:
        """Reads the messages of a row, each with a text or None as content, and its other keys."""
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
        variables = {k: v for k, v in self._kept(row).items() if k != self._key}
        check_surrogates(document, json.dumps([read, variables], ensure_ascii=False))
        return read, variables

    def _kept(self, value: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in value.items() if k not in self._ignored and v is not None}

    def _text(self, document: Document, name: str, content: Any) -> str:
        """Returns the text of a message; its content is a string, or a list of parts with text."""
        if isinstance(content, str):
            return content
        parts = content if type(content) is list else []
        texts = [text for text in map(self._text_of_part, parts) if text is not None]
        if not texts or len(texts) < len(parts):
            raise bad_document(
                document,
                f"the content of {name} is a JSON {json_type(content)} that is not text: give a "
                'string, or a list of {"type": "text", "text": ...}',
            )
        return "".join(texts)

    def _text_of_part(self, part: Any) -> str | None:
        """Returns the text of a part, None if the part is not text, or holds more than text."""
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
        """Renders a conversation; returns None if the template raises."""
        try:
            return self._render(messages, variables, **options)
        except Exception:  # a template may raise any exception
            return None

    def _without_none(self, messages: list[Message], variables: dict[str, Any]) -> list[Message]:
        """Replaces null content by empty texts, if the template cannot render null.

        Some templates test for null before they render tool calls; others would write "None".
        """
        texts = [{**m, "content": "" if m["content"] is None else m["content"]} for m in messages]
        if texts == messages:
            return messages
        null, text = self._rendered(messages, variables), self._rendered(texts, variables)
        if null is None or (text is not None and null.count("None") > text.count("None")):
            return texts
        return messages

    def _without_effect(
        self, variables: dict[str, Any], conversations: list[Rendering]
    ) -> Iterator[tuple[str, str]]:
        """Yields each part of a row that the template does not render, and how to leave it out.

        A part is without effect if the rendered text stays the same both when the part is left out
        and when its value changes. Leaving it out is not enough: a template may insert the same
        text by itself (Qwen2's system prompt). A key may be without effect in some of the messages:
        templates leave out the reasoning of earlier answers.

        Args:
            variables: Keys of the row other than its messages.
            conversations: All texts that were rendered from the row; the longest first.
        """
        messages = conversations[0].messages

        def is_idle(*changes: Callable[[list[Message]], tuple[list[Message], Any]]) -> bool:
            return all(
                self._rendered(*change(part), add_generation_prompt=asked) == text
                for part, text, asked in conversations
                for change in changes
            )

        def with_others(values: Any) -> Callable[[list[Message]], tuple[list[Message], Any]]:
            return lambda part: (part, values)

        for key in [key for key, value in variables.items() if value not in EMPTY]:
            others = {k: v for k, v in variables.items() if k != key}
            changed = {**variables, key: _another(variables[key])}
            if is_idle(with_others(others), with_others(changed)):
                yield f'the key "{key}"', _IGNORE_KEYS
        used = {k: None for m in messages for k, value in m.items() if value not in EMPTY}
        for key in [key for key in used if key not in ("role", "content")]:

            def shorter(part: list[Message], key: str = key) -> tuple[list[Message], Any]:
                return [{k: v for k, v in m.items() if k != key} for m in part], variables

            def other(part: list[Message], key: str = key) -> tuple[list[Message], Any]:
                changed = [{k: _another(v) if k == key else v for k, v in m.items()} for m in part]
                return changed, variables

            if is_idle(shorter, other):
                yield f'the key "{key}" of messages', _IGNORE_KEYS
        roles = {message["role"]: None for message in messages if message["content"]}
        for role in [role for role in roles if role not in SPEAKERS]:

            def fewer(part: list[Message], role: str = role) -> tuple[list[Message], Any]:
                return [m for m in part if m["role"] != role], variables

            def says_more(part: list[Message], role: str = role) -> tuple[list[Message], Any]:
                return [
                    {**m, "content": _another(m["content"])} if m["role"] == role else m
                    for m in part
                ], variables

            if is_idle(fewer, says_more):
                yield f'the messages of the role "{role}"', "take these messages out of the file"

    def _tail(self, messages: list[Message], variables: dict[str, Any], whole: str) -> str | None:
        """Finds the text that the template appends to every conversation, even without being asked.

        LLaDA's template appends the header of another answer, which must not be a part of a
        response. This text is the rendered text of a conversation without messages.

        Args:
            messages: The conversation.
            variables: The other keys of its row.
            whole: The rendered conversation.

        Returns:
            The text, None if it cannot be found.
        """
        continued = self._render([*messages, {"role": "user", "content": "x"}], variables)
        if continued.startswith(whole):
            return ""
        # A batch of one conversation, since transformers does not accept an empty conversation
        # alone. The result is a list of one text.
        batch: Any = [[]]
        texts: Any = self._rendered(batch, variables)
        if texts is None:  # the template reads the first message, which is not there
            return None
        (tail,) = texts
        is_tail = whole.endswith(tail) and continued.startswith(whole.removesuffix(tail))
        return tail if is_tail else None


@contextmanager
def _refusal(document: Document) -> Iterator[None]:
    """Turns any exception of a template into an error of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise bad_document(document, f"the chat template refuses it: {reason}") from error


def template_digest(directory: str) -> str:
    """Returns a digest of the chat template and the special tokens of a Hugging Face tokenizer.

    Args:
        directory: Directory of the tokenizer.
    """
    tokenizer = open_hugging_face(directory)
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest([tokenizer.chat_template, tokens])


def undated(template: str, date: datetime.date) -> str:
    """Changes a chat template so that it writes `date` for today's date."""
    return _with_date(template, date.strftime)


def _another(value: Any) -> Any:
    """Returns a different value of the same type; lists and objects stay unchanged."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value} probe" if isinstance(value, str) else value


@functools.cache
def _with_date(template: str, write_date: Callable[[str], str]) -> str:
    """Changes a template so that `strftime_now` writes a date other than today's.

    The template defines a macro of that name. A variable would not work, since transformers only
    accepts plain values.

    Args:
        template: A chat template.
        write_date: Maps a format to the date, like `datetime.date.strftime`.
    """
    if ASKS_FOR_DATE not in template:
        return template
    import jinja2

    tokens = jinja2.Environment().lex(template)
    strings = [text[1:-1] for _, kind, text in tokens if kind == "string" and "%" in text]
    # Resolve escapes as jinja does.
    formats = [s.encode("ascii", "backslashreplace").decode("unicode-escape") for s in strings]
    dates = json.dumps({text: write_date(text) for text in formats})
    return (
        f"{{% macro strftime_now(format) %}}{{% set dates = {dates} %}}"
        "{% if format in dates %}{{ dates[format] }}{% else %}"
        "{{ raise_exception('strftime_now(' ~ format ~ '): write the format out there') }}"
        # Jinja removes this line end, so that the template still begins at the start of a line.
        "{% endif %}{% endmacro %}\n" + template
    )


def _no_date(_format: str) -> str:
    return ""
