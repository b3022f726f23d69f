"""The project's .md files as tests see them: links, anchors, code blocks and commands.

A command is a line of a code block, or a code span, that starts one of the project's programs.
"""

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests import ROOT

FOLDERS = (".github", "examples", "megatron_mdm", "tests", "tools")
# What may stand before a program: with these a line still is a command.
WRAPPERS = {"do", "then", "exec", "timeout", "sbatch", "srun", "nohup", "time"}
PROGRAMS = {"python", "torchrun", "bash"}
# A mark before a code block: <!-- not run: it needs eight GPUs -->
MARK = re.compile(r"<!-- not run: (.+?) -->")


@dataclass(frozen=True)
class Code:
    """A code block, a code span of a table, or another code span.

    Attributes:
        page: its file, relative to the root.
        line: where it begins, or where the paragraph or row begins that it is in.
        kind: block, cell or span.
        language: of a fenced block.
        text: without its indent.
        mark: why the tests do not run it, if the page says so.
    """

    page: str
    line: int
    kind: str
    language: str
    text: str
    mark: str | None


@dataclass(frozen=True)
class Command:
    """One program with its words.

    Attributes:
        code: where it stands.
        environment: names and values before it.
        words: the program and what follows, without redirections.
    """

    code: Code
    environment: dict[str, str]
    words: list[str]

    @property
    def place(self) -> str:
        return f"{self.code.page}:{self.code.line}: {self}"

    @property
    def is_partial(self) -> bool:
        """Whether words are left out: `...`, or a code span within a sentence."""
        return "..." in self.words or self.code.kind == "span"

    def __str__(self) -> str:
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, *self.words])


@cache
def pages() -> list[str]:
    """All .md files of the project, relative to the root."""
    found = [*ROOT.glob("*.md"), *(x for name in FOLDERS for x in (ROOT / name).rglob("*.md"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def all_text() -> str:
    """The words of all pages, with single spaces between them."""
    return " ".join(" ".join(text_of(page).split()) for page in pages())


@cache
def _tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text_of(page))


def links(page: str) -> Iterator[str]:
    """Targets of links and images, those in HTML too."""
    for token in _tokens(page):
        for part in [token, *(token.children or [])]:
            if part.type in ("link_open", "image"):
                yield str(part.attrs.get("href") or part.attrs["src"])
            elif part.type in ("html_block", "html_inline"):
                yield from re.findall(r'(?:src|srcset|href)="([^"]+)"', part.content)


@cache
def anchors(page: str) -> frozenset[str]:
    """Anchors of the headings, as GitHub makes them."""
    found: set[str] = set()
    tokens = _tokens(page)
    for heading, inline in itertools.pairwise(tokens):
        if heading.type != "heading_open":
            continue
        parts = inline.children or []
        words = "".join(x.content for x in parts if x.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        number = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", x) is not None for x in found)
        found.add(f"{slug}-{number}" if number else slug)
    return frozenset(found)


def codes(page: str) -> Iterator[Code]:
    """Code blocks and code spans in their order."""
    mark, in_table = None, False
    for token in _tokens(page):
        in_table = (in_table or token.type == "table_open") and token.type != "table_close"
        line = (token.map or [0])[0] + 1
        if token.type == "html_block":
            found = MARK.search(token.content)
            mark = found[1] if found else None
        elif token.type in ("fence", "code_block"):
            yield Code(page, line, "block", token.info.strip(), token.content, mark)
            mark = None
        elif token.type == "inline":
            kind = "cell" if in_table else "span"
            for part in token.children or []:
                if part.type == "code_inline":
                    yield Code(page, line, kind, "", part.content, None)


def commands(page: str) -> Iterator[Command]:
    """The commands that start a program of the project, or pytest."""
    for code in codes(page):
        if code.language not in ("", "bash", "sh", "console"):
            continue
        values = dict(re.findall(r"\bfor (\w+) in (\S+)", code.text))
        for line in code.text.replace("\\\n", " ").splitlines():
            for words in _simple_commands(line):
                command = _command(code, [values.get(word.strip("${}"), word) for word in words])
                if command is not None:
                    yield command


def _simple_commands(line: str) -> list[list[str]]:
    """The words of each command in a line of a shell, without comments and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # a quotation that does not end: no command
        return []
    found: list[list[str]] = [[]]
    skip = False
    for word in words:
        if skip:
            skip = False
        elif set(word) <= set("<>&") and set(word) & set("<>"):
            skip = True
        elif set(word) <= set("();&|"):
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def _command(code: Code, words: list[str]) -> Command | None:
    environment = {}
    place = 0
    while place < len(words) and (match := re.fullmatch(r"(\w+)=(.*)", words[place], re.DOTALL)):
        environment[match[1]] = match[2]
        place += 1
    is_wrapped = place < len(words) and words[place] in WRAPPERS
    if is_wrapped:
        while place < len(words) and words[place] not in PROGRAMS:
            if words[place].endswith(".sh"):
                words = [*words[:place], "bash", *words[place:]]
            else:
                place += 1
    if place >= len(words) - 1 or words[place] not in PROGRAMS:
        return None
    rest = words[place:]
    own = rest[0] != "python" or is_own(rest[1:])
    return Command(code, environment, rest) if own else None


def is_own(words: list[str]) -> bool:
    """Whether what follows `python` is the project's, or pytest."""
    if words[0] == "-m":
        return len(words) > 1 and words[1].split(".")[0] in ("megatron_mdm", "pytest")
    return words[0].endswith(".py") and "/" in words[0]
