"""Class names in any script are drawn without empty boxes; the fonts' own character tables are the truth."""

import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont

from pixelclip.inference import fonts
from pixelclip.inference.fonts import dejavu_sans, replace_missing, typeset
from pixelclip.inference.prediction import Prediction, overlay


@pytest.fixture
def cjk(tmp_path, monkeypatch):
    """Stand in for a system font with two CJK characters: DejaVu Sans whose letters A and B are theirs."""
    font = TTFont(dejavu_sans())
    for table in font["cmap"].tables:
        table.cmap.update({ord("猫"): "A", ord("犬"): "B"})
    font.save(tmp_path / "cjk.ttf")
    monkeypatch.setattr(fonts, "_SYSTEM", (str(tmp_path / "no such.ttf"), str(tmp_path / "cjk.ttf")))


@pytest.mark.parametrize("name", ["Straßenbäume", "γάτα", "кошка", "dog, puppy"])
def test_latin_greek_and_cyrillic_names_have_a_font(name, monkeypatch):
    monkeypatch.setattr(fonts, "_SYSTEM", ())
    ((text, font),) = typeset([(0, name)], 20)
    assert text == name
    if not name.isascii():
        assert {ord(c) for c in name} <= TTFont(font.path).getBestCmap().keys()


def test_cjk_names_use_a_font_of_the_system_if_there_is_one(cjk):
    entries = [(0, "猫  60 %"), (1, "γάτα"), (2, "cat"), (3, "犬 鳥 in snow")]
    drawn = typeset(entries, 20)
    assert [text for text, _ in drawn] == ["猫  60 %", "γάτα", "cat", "犬 #3 in snow"]
    assert drawn[0][1].path.endswith("cjk.ttf") and drawn[1][1].path == dejavu_sans()


def test_names_that_no_font_has_are_written_as_their_number(monkeypatch):
    monkeypatch.setattr(fonts, "_SYSTEM", ())
    assert [text for text, _ in typeset([(7, "黑 猫  60 %"), (8, "cat 猫")], 20)] == ["#7  60 %", "cat #8"]
    labels = np.repeat(np.arange(2, dtype=np.uint16), 50)[None].repeat(40, axis=0)
    pictures = [
        np.asarray(overlay(Image.new("RGB", (100, 40)), Prediction(labels, np.zeros((2, 1, 1), np.float32), names)))
        for names in (["cat", "猫"], ["cat", "#1"], ["cat", "#2"])
    ]
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


def test_a_name_without_missing_characters_is_unchanged():
    assert replace_missing("a [b] ^c", ImageFont.load_default(12), 0) == "a [b] ^c"
