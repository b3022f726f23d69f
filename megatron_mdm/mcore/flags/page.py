"""Prints the page of all flags, FLAGS.md.

    python -m megatron_mdm.mcore.flags.page > megatron_mdm/FLAGS.md

The page has the texts of `python -m megatron_mdm.pretrain --help`.
"""

import re
from argparse import Action, ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.training.arguments import add_megatron_arguments

from megatron_mdm.config import SECTIONS, flag
from megatron_mdm.libraries import FUSED_BY
from megatron_mdm.mcore.device import CPU_DEFAULTS
from megatron_mdm.mcore.flags.arguments import (
    HELP,
    NEEDED,
    REFUSED,
    TITLE,
    add_arguments,
)

TOP = """\
<!-- Made by python -m megatron_mdm.mcore.flags.page. A test holds it equal to the flags. -->
# Flags

`python -m megatron_mdm.pretrain` takes all flags of Megatron and the flags below. With `--help` it
shows the same texts in its last groups. A value outside its range ends the run with one line before
anything starts. [objective/README.md](objective/README.md) has the formulas.
"""

REST = """
## Flags of Megatron with another meaning

{meanings}

## Flags of Megatron with another default

Flags on the command line win over these defaults.

- Always: {needed}. The objective and `--async-save` need them.
- Without a library that has the fusion (apex, Transformer Engine): {fusions}.
- With `--mdm-device cpu`: {on_the_cpu}.

## Flags of Megatron that are refused

{refused}"""


def page() -> str:
    """The page, Markdown."""
    megatrons = add_megatron_arguments(ArgumentParser())._actions
    parser = add_arguments(ArgumentParser())
    groups = {group.title: group for group in parser._action_groups}
    parts = [TOP]
    for title in SECTIONS:
        rows = (_row(parser, action) for action in groups[TITLE.format(title)]._group_actions)
        heading = f"{title[0].upper()}{title[1:]}"
        table = _table(("flag", "default", "meaning"), rows)
        parts.append(f"## {heading}\n\n{table}\n")
    rest = REST.format(
        meanings=_table(("flag", "meaning"), _texts(HELP)),
        needed=_settings(megatrons, NEEDED),
        fusions=_settings(megatrons, dict.fromkeys(FUSED_BY, False)),
        on_the_cpu=_settings(megatrons, CPU_DEFAULTS),
        refused=_table(("flag", "reason"), _texts(REFUSED)),
    )
    return "\n".join([*parts, rest.lstrip()])


def _row(parser: ArgumentParser, action: Action) -> tuple[str, str, str]:
    """Flag with its values, default and meaning of one of our flags."""
    text, default = parser._get_formatter()._expand_help(action).split(" Default: ")
    name, default = action.option_strings[0], default.removesuffix(".")
    if action.const is False:
        text += f" Without the flag, {default}."
        default = "off"
    if action.choices:
        values = ", ".join(f"`{value}`" for value in action.choices)
        return f"`{name}`: {values}", default, _with_code(text)
    metavar = action.metavar or ()
    values = metavar if isinstance(metavar, str) else " ".join(metavar)
    more = " ..." if action.nargs == "+" and isinstance(metavar, str) else ""
    return f"`{f'{name} {values}'.rstrip()}{more}`", default, _with_code(text)


def _texts(texts: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Flags of Megatron, by the names of their arguments, with a text for each."""
    return ((f"`{flag(name)}`", _with_code(text)) for name, text in texts.items())


def _with_code(text: str) -> str:
    """A text of --help with its flags as code."""
    return re.sub(r"--\w[\w-]*", r"`\g<0>`", text)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def _settings(actions: Sequence[Action], values: Mapping[str, Any]) -> str:
    """The flags of Megatron that set arguments to other values than Megatron's defaults."""
    flags = []
    for name, value in values.items():
        for action in (x for x in actions if x.dest == name and x.default != value):
            if action.nargs != 0:
                flags.append(f"`{action.option_strings[0]} {value}`")
            elif action.const == value:
                flags.append(f"`{action.option_strings[0]}`")
    return ", ".join(flags)


if __name__ == "__main__":
    print(page(), end="")
