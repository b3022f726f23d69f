"""Decoding made visible: in the terminal, and as a picture of the order in which tokens came."""

import shutil
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megatron_mdm.errors import escaped
from megatron_mdm.files import complete_or_absent, write_errors

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = (".png", ".gif")
COLUMNS = 12  # tokens in a line of the picture
DPI = 80
LETTERS = 11  # of a token that fit into its cell
FRAMES = 100  # of an animation, at most: more calls than that are shown several at a time


class Screen:
    """Texts that change step by step: redrawn in place on a terminal, else one line a step.

    Attributes:
        stream: where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.drawn = 0  # terminal lines that the next redraw starts over

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Shows the texts as they stand after a step."""
        if not self.stream.isatty():
            for text in texts:
                self.stream.write(f"step {step}: {one_line(text)}\n")
            self.stream.flush()
            return
        size = shutil.get_terminal_size()
        lines = [line for text in texts for line in wrapped(text, size.columns)]
        lines = [f"step {step}", *lines][-(size.lines - 1) :]
        self.clear()
        self.stream.write("\n".join(lines) + "\n")
        self.stream.flush()
        self.drawn = len(lines)

    def clear(self) -> None:
        """Takes away what was drawn on a terminal."""
        if self.drawn:
            self.stream.write(f"\x1b[{self.drawn}F\x1b[J")
        self.drawn = 0


def shown_on(stream: TextIO, text: str) -> str:
    """A text as a stream should get it: on a terminal, which would obey them, without controls.

    Args:
        stream: where it goes. Into a file or a pipe it goes as it is.
        text: what a model wrote, of which line ends and tabs stay.
    """
    if not stream.isatty():
        return text
    return "".join(escaped(c, kept="\n\t") if unicodedata.category(c) == "Cc" else c for c in text)


def one_line(text: str) -> str:
    """The text with signs for control characters."""
    named = {"\n": "⏎", "\t": "⇥"}
    return "".join(named.get(c, c if c.isprintable() else "�") for c in text)


def wrapped(text: str, columns: int) -> list[str]:
    """The lines that a terminal of so many columns breaks the text into."""
    lines = []
    for paragraph in text.expandtabs(4).split("\n"):
        line, width = "", 0
        for letter in one_line(paragraph):
            cells = 2 if unicodedata.east_asian_width(letter) in "WF" else 1
            cells = 0 if unicodedata.combining(letter) else cells
            if width + cells > columns:
                lines.append(line)
                line, width = "", 0
            line, width = line + letter, width + cells
        lines.append(line)
    return lines


def draw_order(path: str, texts: Sequence[str], order: Sequence[int]) -> None:
    """Draws a row in reading order, each token in the colour of the call that filled it.

    Args:
        path: .png, everything filled; or .gif, from the prompt to the end, a frame a call.
        texts: of the tokens.
        order: after which model call each token was there, 0 for given ones.

    Raises:
        UserError: the file cannot be written.
    """
    frames = list(order_frames(texts, order))
    with complete_or_absent(path) as (name,), write_errors(path), open(name, "wb") as file:
        if Path(path).suffix.lower() == ".gif":
            # Milliseconds: some ten seconds in all, at most half a second a frame; the end stays.
            pace = min(500, 10_000 // len(frames))
            durations = [pace] * (len(frames) - 1) + [3000]
            frames[0].save(
                file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
            )
        else:
            frames[-1].save(file, "PNG")


def order_frames(texts: Sequence[str], order: Sequence[int]) -> Iterator["Image"]:
    """The pictures of `draw_order`: the given tokens, then what each call added."""
    calls = max(order, default=0)
    empty, _ = _grid(texts, [call if call == 0 else None for call in order])
    full, boxes = _grid(texts, order)
    shown = min(calls, FRAMES - 1)
    done = 0
    yield empty.copy()
    for frame in range(1, shown + 1):
        upto = round(frame * calls / shown)
        for call, box in zip(order, boxes, strict=True):
            if done < call <= upto:
                empty.paste(full.crop(box), box)
        done = upto
        yield empty.copy() if upto < calls else full


def _grid(
    texts: Sequence[str], order: Sequence[int | None]
) -> tuple["Image", list[tuple[int, int, int, int]]]:
    """The picture of all tokens, blank where the call is None, and the pixels of each cell."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL.Image import frombuffer

    lines = max(1, -(-len(texts) // COLUMNS))
    last = max((call for call in order if call), default=2)
    figure = Figure(figsize=(COLUMNS, 0.4 * lines + 0.8), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    # In inches: a line of explanation above, and cells of 1 x 0.4 in a narrow margin.
    height = figure.get_figheight()
    axes = figure.add_axes((0.02, 0.1 / height, 0.96, 0.4 * lines / height))
    axes.set(xlim=(0, COLUMNS), ylim=(lines, 0))
    axes.set_axis_off()
    axes.set_title("given: grey; filled from the first call (dark) to the last (light)", size=10)
    colours = ScalarMappable(Normalize(1, max(last, 2)), colormaps["viridis"])
    corners = []
    for index, (text, call) in enumerate(zip(texts, order, strict=True)):
        y, x = divmod(index, COLUMNS)
        corners += [(x, y), (x + 1, y + 1)]
        face = "white" if call is None else "0.93" if call == 0 else colours.to_rgba(call)
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor="0.8"))
        if call is None:
            continue
        shown = one_line(text)
        shown = shown if len(shown) <= LETTERS else shown[: LETTERS - 1] + "…"
        color = "black" if call == 0 or call > 0.6 * last else "white"
        axes.text(
            *(x + 0.5, y + 0.5, shown),
            ha="center",
            va="center",
            size=8,
            color=color,
            parse_math=False,
            clip_on=True,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        canvas.draw()
    image = frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    # Pixels count from the bottom in matplotlib, and from the top in the picture.
    pixels = axes.transData.transform(corners or [(0, 0), (0, 0)]).round().astype(int)
    pixels[:, 1] = image.height - pixels[:, 1]
    return image.convert("RGB"), [(*a, *b) for a, b in pixels.reshape(-1, 2, 2).tolist()]
