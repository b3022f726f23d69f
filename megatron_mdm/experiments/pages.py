"""Inserts results into Markdown pages, between comments that mark their places."""

import pathlib
import re
from collections.abc import Callable, Mapping

from megatron_mdm.errors import UserError
from megatron_mdm.files import write_text


def insert(path: str, kind: str, blocks: Mapping[str, Callable[[], str]]) -> None:
    """Replaces the text between `<!-- KIND: NAME -->` and `<!-- end -->` in a Markdown file.

    Args:
        path: the Markdown file.
        kind: KIND, the first word of the comments.
        blocks: NAME -> function that returns the Markdown for this place.

    Raises:
        UserError: the file cannot be read or written, has no such comments, or has a NAME that is
            not in `blocks`.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--insert {path}: cannot be read ({error})") from error
    write_text(path, inserted(text, path, kind, blocks))


def inserted(text: str, path: str, kind: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """Returns the text of a file with the blocks inserted.

    Args:
        text: the text of the file.
        path: the path of the file, for the error message.
        kind: see `insert`.
        blocks: see `insert`.

    Raises:
        UserError: see `insert`.
    """
    place = re.compile(rf"(<!-- {kind}: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    names = {match[2] for match in place.finditer(text)}
    if not names or not names <= set(blocks):
        raise UserError(
            f"--insert {path}: needs <!-- {kind}: NAME --> and <!-- end -->, where NAME is one of "
            f"{', '.join(blocks)}"
        )
    return place.sub(lambda match: f"{match[1]}{blocks[match[2]]()}\n{match[3]}", text)
