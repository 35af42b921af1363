"""Tables get into pages between their marks."""

import pytest


@pytest.fixture
def fill(script):
    return script("result_files").fill


def test_fill_replaces_marked_blocks_and_nothing_else(fill):
    document = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb"
    filled = fill(document, {"x": r"new \1"})
    assert filled == "a\n<!-- begin x -->\nnew \\1\n<!-- end x -->\nb"
    assert fill(filled, {"x": "new \\1\n"}) == filled


@pytest.mark.parametrize("page", ["", "<!-- end x -->\n<!-- begin x -->\n", "<!-- begin x -->\n<!-- end y -->"])
def test_a_page_without_marks(fill, page):
    with pytest.raises(ValueError, match="expected <!-- begin x --> and <!-- end x --> around"):
        fill(page, {"x": "table"})
