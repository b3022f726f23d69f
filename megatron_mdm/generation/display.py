"""Shows decoding: live in the terminal, and as a picture of the order of filled tokens."""

import shutil
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from megatron_mdm.errors import escaped
from megatron_mdm.files import complete_or_absent, write_errors
from megatron_mdm.pictures import blank_figure

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = (".png", ".gif")
COLUMNS = 12  # tokens in a line of the picture
DPI = 80
LINE, HEAD = 0.4, 0.8  # heights in inches: a line of tokens; the scale above, with margins
GIVEN, BORDER = "0.93", "0.75"  # greys: cells of given tokens, borders of cells
LETTERS = 11  # letters of a token that fit into its cell
FRAMES = 100  # most frames of an animation; with more calls, a frame shows several calls


class Screen:
    """Shows texts that change step by step: in place on a terminal, else as one line per step.

    Attributes:
        stream: the output stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.drawn = 0  # number of terminal lines that the next redraw overwrites

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Shows the texts after a step."""
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
        """Removes the drawn lines from a terminal."""
        if self.drawn:
            self.stream.write(f"\x1b[{self.drawn}F\x1b[J")
        self.drawn = 0


def shown_on(stream: TextIO, text: str) -> str:
    """Escapes control characters of a text for a terminal, which would execute them.

    Args:
        stream: the output stream. For a file or a pipe, the text is returned unchanged.
        text: a text from a model. Line ends and tabs are kept.
    """
    if not stream.isatty():
        return text
    return "".join(escaped(c, kept="\n\t") if unicodedata.category(c) == "Cc" else c for c in text)


def one_line(text: str) -> str:
    """The text in one line: control characters are replaced by visible symbols."""
    named = {"\n": "⏎", "\t": "⇥"}
    return "".join(named.get(c, c if c.isprintable() else "�") for c in text)


def wrapped(text: str, columns: int) -> list[str]:
    """Breaks a text into lines as a terminal with `columns` columns does."""
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
    """Draws a row of tokens in reading order, each in the colour of the call that filled it.

    Args:
        path: a .png shows the filled row; a .gif shows the decoding, one frame per call.
        texts: text of each token.
        order: number of the model call that filled each token; 0 for given tokens.

    Raises:
        UserError: the file cannot be written.
    """
    frames = list(order_frames(texts, order))
    with complete_or_absent(path) as (name,), write_errors(path), open(name, "wb") as file:
        if Path(path).suffix.lower() == ".gif":
            # Milliseconds: about ten seconds in all, at most half a second per frame; the last
            # frame stays for three seconds.
            pace = min(500, 10_000 // len(frames))
            durations = [pace] * (len(frames) - 1) + [3000]
            frames[0].save(
                file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
            )
        else:
            frames[-1].save(file, "PNG")


def order_frames(texts: Sequence[str], order: Sequence[int]) -> Iterator["Image"]:
    """The frames of `draw_order`: the given tokens, then the tokens added by each call."""
    calls = max(order, default=0)
    empty, _ = _grid(texts, [call if call == 0 else None for call in order], calls)
    full, boxes = _grid(texts, order, calls)
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
    texts: Sequence[str], order: Sequence[int | None], calls: int
) -> tuple["Image", list[tuple[int, int, int, int]]]:
    """Draws all tokens, blank if their call is None; also returns the pixel box of each cell.

    `calls`, the number of model calls, is the end of the colour scale.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle
    from PIL.Image import frombuffer

    lines = max(1, -(-len(texts) // COLUMNS))
    colours = ScalarMappable(Normalize(1, max(calls, 2)), colormaps["viridis"])
    with blank_figure() as figure:
        figure.set(layout_engine="none", dpi=DPI, figwidth=COLUMNS, figheight=LINE * lines + HEAD)
        canvas = FigureCanvasAgg(figure)
        # Sizes in inches: the scale at the top, and below it cells of 1 x 0.4 with a narrow margin.
        height = figure.get_figheight()
        axes = figure.add_axes((0.02, 0.1 / height, 0.96, LINE * lines / height))
        axes.set(xlim=(0, COLUMNS), ylim=(lines, 0))
        axes.set_axis_off()
        _draw_scale(figure, colours, calls)
        corners = []
        for index, (text, call) in enumerate(zip(texts, order, strict=True)):
            y, x = divmod(index, COLUMNS)
            corners += [(x, y), (x + 1, y + 1)]
            face = "white" if call is None else GIVEN if call == 0 else colours.to_rgba(call)
            # Not clipped: half of the border of an outer cell lies outside the axes.
            cell = Rectangle((x, y), 1, 1, facecolor=face, edgecolor=BORDER, clip_on=False)
            axes.add_patch(cell)
            if call is None:
                continue
            shown = in_cell(text)
            is_light = call == 0 or sum(face[:3]) > 1.4
            label = axes.text(
                *(x + 0.5, y + 0.5, shown),
                ha="center",
                va="center",
                size=8,
                color="black" if is_light else "white",
                parse_math=False,
                clip_on=True,
            )
            label.set_clip_path(cell)  # the text does not extend into the next cell
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            canvas.draw()
    image = frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    # matplotlib counts pixels from the bottom, the image from the top.
    pixels = axes.transData.transform(corners or [(0, 0), (0, 0)]).round().astype(int)
    pixels[:, 1] = image.height - pixels[:, 1]
    return image.convert("RGB"), [(*a, *b) for a, b in pixels.reshape(-1, 2, 2).tolist()]


def in_cell(text: str) -> str:
    """The text of a token for its cell: spaces become middle dots, and a long text is cut."""
    shown = one_line(text).replace(" ", "·")
    return shown if len(shown) <= LETTERS else shown[: LETTERS - 1] + "…"


def _draw_scale(figure: Any, colours: Any, calls: int) -> None:
    """Draws the legend above the cells: the grey of given tokens, and the colour of each call."""
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    width, height = figure.get_size_inches()
    middle = 1 - 0.28 / height
    axes = figure.add_axes((0.02, middle - 0.1 / height, 0.2 / width, 0.2 / height))
    axes.set_axis_off()
    axes.add_patch(Rectangle((0, 0), 1, 1, facecolor=GIVEN, edgecolor=BORDER, clip_on=False))
    figure.text(0.02 + 0.3 / width, middle, "given (· is a space)", va="center")
    if not calls:
        return
    figure.text(0.49, middle, "filled by model call", va="center", ha="right")
    bar = figure.add_axes((0.5, middle - 0.1 / height, 0.48, 0.2 / height))
    numbers = np.arange(1, calls + 1)
    bar.pcolormesh(np.append(numbers, calls + 1) - 0.5, [0, 1], [numbers], cmap=colours.cmap)
    bar.collections[0].set_norm(colours.norm)
    bar.grid(visible=False)
    bar.set_yticks([])
    bar.xaxis.set_major_locator(MaxNLocator(10, integer=True))
