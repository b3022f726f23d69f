"""Prompts with gaps, and the display of decoding."""

import io
import sys

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from megatron_mdm.data.tokenizer import train_tokenizer
from megatron_mdm.errors import UserError
from megatron_mdm.files import check_picture
from megatron_mdm.generation import display
from megatron_mdm.generation.display import (
    COLUMNS,
    DPI,
    LETTERS,
    Screen,
    _grid,
    draw_order,
    in_cell,
    order_frames,
    shown_on,
    wrapped,
)
from megatron_mdm.generation.prompts import (
    Spelling,
    prompt_tokens,
    read_prompts,
    same_lengths,
    until_end,
)

TEXT = "def f(a, b):\n    return a + b  # äöü\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A real tokenizer with a lossless encoding."""
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "text.txt").write_text(TEXT * 50, encoding="utf-8")
    train_tokenizer([str(directory / "text.txt")], str(directory / "t.model"), vocab_size=300)
    return sentencepiece.SentencePieceProcessor(str(directory / "t.model"))


def test_gaps_and_suffix_stand_between_the_same_tokens(tokenizer):
    mask = tokenizer.piece_to_id("<mask>")

    def row(prompt, length=0, suffix=""):
        return prompt_tokens(tokenizer.encode, prompt, length, suffix, "<mask>", mask)

    assert row(TEXT) == tokenizer.encode(TEXT)
    assert row("", 3) == [mask] * 3
    assert row("<mask><mask>") == [mask] * 2
    a, b = tokenizer.encode("def f("), tokenizer.encode(" a): return ")
    assert row("def f(<mask> a): return ", 2, " a<mask>") == [
        *[*a, mask, *b, mask, mask],
        *[*tokenizer.encode(" a"), mask],
    ]


def test_partly_filled_rows_can_be_read(tokenizer):
    mask = tokenizer.piece_to_id("<mask>")
    spelling = Spelling(tokenizer.encode, tokenizer.decode, mask)
    ids = tokenizer.encode(TEXT)
    assert spelling.partial(ids) == TEXT
    pieces = [spelling.inside([token]) for token in ids]
    gap = next(i for i, piece in enumerate(pieces) if "return" in piece)
    holes = [mask if i in (0, gap, len(ids) - 1) else token for i, token in enumerate(ids)]
    pieces[0] = pieces[gap] = pieces[-1] = "▒"
    assert spelling.partial(holes) == "".join(pieces)
    assert spelling.partial([mask] * 4) == "▒" * 4


def test_rows_share_a_call_only_with_rows_of_their_length():
    rows = [[0] * n for n in (3, 5, 3, 3, 4, 5)]
    assert same_lengths(rows, 2) == [[0, 2], [3], [1, 5], [4]]


def test_text_ends_at_an_end_token_behind_what_was_given():
    assert until_end([1, 9, 2, 3, 9, 9], [1, 1, 0, 0, 0, 0], [9]) == [1, 9, 2, 3]
    assert until_end([9, 2], [0, 0], [9]) == []
    assert until_end([9, 2, 3], [0, 0, 1], [9]) == [9, 2, 3]
    assert until_end([1, 2], [0, 0], ()) == [1, 2]


def test_prompt_files(tmp_path):
    lines, objects, empty = (tmp_path / name for name in ("a.txt", "a.jsonl", "b.txt"))
    lines.write_text(" one\n\ntwo \n")
    objects.write_text('{"prompt": "one\\ntwo"}\n{"prompt": ""}\n')
    empty.write_text("\n")
    odd = tmp_path / "c"
    odd.write_text("\ufeffone\x0cpage\u2028line\r\ntwo\rtwo\n")
    assert read_prompts(str(odd)) == ["one\x0cpage\u2028line", "two\rtwo"]
    written = read_prompts(str(objects), file_format="text")
    assert written == ['{"prompt": "one\\ntwo"}', '{"prompt": ""}']
    assert read_prompts(str(lines)) == [" one", "two "]
    assert read_prompts(str(objects)) == ["one\ntwo", ""]
    with pytest.raises(UserError, match="b.txt holds no prompt"):
        read_prompts(str(empty))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_redrawn_in_place(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("LINES", "6")
    stream = Terminal()
    screen = Screen(stream)
    screen.show(1, ["0123456789ab", "x"])
    screen.show(2, ["a\nb\nc\nd\ne"])
    screen.clear()
    assert stream.getvalue() == (
        "step 1\n0123456789\nab\nx\n"
        "\x1b[4F\x1b[Ja\nb\nc\nd\ne\n"  # only the last five lines, because it is too long
        "\x1b[5F\x1b[J"
    )


def test_a_file_gets_one_line_a_step():
    stream = io.StringIO()
    screen = Screen(stream)
    screen.show(1, ["a\n▒", "b\x1b"])
    screen.clear()
    assert stream.getvalue() == "step 1: a⏎▒\nstep 1: b�\n"


def test_a_terminal_gets_no_control_characters():
    text = "a\x1b[2J\tb\n\x07\x9b\x7f \u200d \U0001f600\r\n"
    assert shown_on(io.StringIO(), text) == text
    assert shown_on(Terminal(), text) == ("a\\x1b[2J\tb\n\\x07\\x9b\\x7f \u200d \U0001f600\\r\n")


def test_wide_letters_take_two_columns():
    assert wrapped("日本語ab", 5) == ["日本", "語ab"]
    assert wrapped("e\u0301" * 3, 3) == ["e\u0301" * 3]


def test_each_frame_adds_the_tokens_of_one_call():
    """A frame changes only the cells of its tokens. The last frame has all tokens."""
    order = [0, 3, 1, 2, 2, 3]
    frames = [np.asarray(frame) for frame in order_frames([f"${i}" for i in range(6)], order)]
    assert len(frames) == 4
    width = frames[0].shape[1]
    for call in (1, 2, 3):
        changed = (frames[call] != frames[call - 1]).any(axis=(0, 2)).nonzero()[0]
        places = (changed / width - 0.02) / 0.96 * COLUMNS
        inner = abs(places - places.round()) > 0.03  # leaves out borders, which two cells share
        assert set(places[inner].astype(int)) == {
            i for i, filled in enumerate(order) if filled == call
        }
    assert np.array_equal(frames[-1], np.asarray(_grid([f"${i}" for i in range(6)], order, 3)[0]))


def test_pictures_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(display, "FRAMES", 5)
    texts, order = [f"t{i}$" for i in range(COLUMNS + 3)], [0, 0, *range(1, COLUMNS + 2)]
    draw_order(str(tmp_path / "a.gif"), texts, order)
    draw_order(str(tmp_path / "a.png"), texts, order)
    frames = [np.asarray(frame) for frame in order_frames(texts, order)]
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == len(frames) == 5
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), frames[-1])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gif", "a.png"]


def test_pictures_that_cannot_be_drawn(tmp_path, monkeypatch):
    check_picture("order.GIF", "--picture", display.PICTURES)
    with pytest.raises(UserError, match="--picture order.pdf: must end in .png or .gif"):
        check_picture("order.pdf", "--picture", display.PICTURES)
    with monkeypatch.context() as without, pytest.raises(UserError, match="needs matplotlib"):
        without.setitem(sys.modules, "matplotlib", None)
        check_picture("order.png", "--picture", display.PICTURES)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        draw_order(str(tmp_path / "file" / "order.png"), ["a"], [1])


def test_borders_are_whole_and_spaces_are_seen():
    assert in_cell(" a  b\n") == "·a··b⏎" and in_cell(" " * 20) == "·" * (LETTERS - 1) + "…"
    image, boxes = _grid(["a"] * (COLUMNS + 2), [0] * (COLUMNS + 2), 0)
    pixels = np.asarray(image).astype(int).sum(axis=2)
    for left, bottom, right, top in boxes:
        low, high = sorted((bottom, top))
        x, y = left + 5, low + 5  # beside the letter
        # Each side has a line that is darker than the cells: inner and outer borders alike.
        sides = [pixels[y, left - 1 : left + 2], pixels[y, right - 1 : right + 2]]
        sides += [pixels[low - 1 : low + 2, x], pixels[high - 1 : high + 2, x]]
        assert max(side.min() for side in sides) < 0.87 * pixels[y, x]


def test_every_frame_has_the_scale_of_all_calls():
    order = [0, 1, 2, 3]
    heads = [np.asarray(frame)[: int(0.6 * DPI)] for frame in order_frames(list("abcd"), order)]
    assert all(np.array_equal(head, heads[0]) for head in heads)
    colours = {tuple(pixel) for pixel in heads[0].reshape(-1, 3)}
    image, boxes = _grid(list("abcd"), order, 3)
    assert {image.getpixel((box[0] + 6, min(box[1], box[3]) + 6)) for box in boxes[1:]} <= colours
