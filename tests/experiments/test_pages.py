"""Results inserted in Markdown pages."""

import pytest

from megatron_mdm.errors import UserError
from megatron_mdm.experiments.pages import insert, inserted

PAGE = "a\n<!-- race: tune -->\nold\n<!-- end -->\nb\n<!-- other: tune -->\nkept\n<!-- end -->\n"
BLOCKS = {"tune": lambda: "new", "claims": lambda: "not asked for"}


def test_results_stand_in_the_places_of_their_kind(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for _ in range(2):  # a repetition changes nothing
        insert(str(page), "race", BLOCKS)
        assert page.read_text() == PAGE.replace("old", "new")


@pytest.mark.parametrize("text", ["nothing", PAGE.replace("race: tune", "race: tunes")])
def test_a_page_without_places_or_with_an_unknown_one_is_refused(text):
    with pytest.raises(UserError, match="^--insert x.md: needs .*: NAME --> .*tune, claims$"):
        inserted(text, "x.md", "race", BLOCKS)


def test_a_page_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere.md: cannot be read"):
        insert(str(tmp_path / "nowhere.md"), "race", BLOCKS)
