"""Pictures: the same bytes whenever they are drawn, legible on light and dark pages."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from mcsd.plots import COLOURS, drawing


def draw(path: Path, about: str | None = None) -> bytes:
    with drawing(path, (3, 2), about, ncols=2) as (_, (left, right)):
        for height in range(len(COLOURS)):
            left.plot([0, 1], [0, height], label=f"line {height}")
        left.legend()
        right.imshow([[0, 1], [1, 0]])
    return path.read_bytes()


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_a_picture_drawn_twice_is_the_same(tmp_path: Path, ending: str) -> None:
    assert draw(tmp_path / f"one.{ending}") == draw(tmp_path / f"two.{ending}")


def test_an_svg_says_what_it_is_of_and_not_when_it_was_drawn(tmp_path: Path) -> None:
    text = draw(tmp_path / "one.svg", "rows 123").decode()
    assert "<dc:description>rows 123</dc:description>" in text
    assert "dc:date" not in text
    assert ">line 1</text>" in text, "text stays text"


def test_the_ground_is_opaque_and_the_colours_are_those_of_the_style(tmp_path: Path) -> None:
    text = draw(tmp_path / "one.svg").decode()
    ground = text[text.index('id="patch_1"') : text.index('id="axes_1"')]
    assert "fill: #ffffff" in ground and "opacity" not in ground
    assert all(f"stroke: {colour.lower()}" in text for colour in COLOURS)


def test_the_style_ends_with_the_picture(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(tmp_path / "one.svg")
    with pytest.raises(ZeroDivisionError), drawing(tmp_path / "none.svg"):
        raise ZeroDivisionError
    assert dict(matplotlib.rcParams) == before
    assert not (tmp_path / "none.svg").exists()
    from matplotlib import pyplot

    assert not pyplot.get_fignums(), "a figure that fails is closed too"
