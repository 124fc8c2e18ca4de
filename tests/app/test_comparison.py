"""What the page shows: shares, legend, heat maps and blended pictures."""

import numpy as np
from PIL import Image

from pixelclip.app.comparison import ALL_CLASSES, compare, legend, pictures
from pixelclip.data.images import palette
from pixelclip.inference.prediction import Prediction

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def fixed(labels, scores=None):
    """Return a model that always gives the same answer."""

    def segment(photo, classes, quality):
        maps = np.zeros((len(classes), 4, 4), np.float32) if scores is None else scores
        return Prediction(labels.astype(np.uint16), maps, list(classes))

    return segment


def halves(left: int, right: int, columns: int = 10):
    labels = np.full((30, 40), right)
    labels[:, :columns] = left
    return labels


def test_legend_shows_the_shares_of_both_models_and_escapes_hostile_names():
    hostile = "<script>alert(1)</script>"
    comparison, prediction = compare(PHOTO, ["sky", hostile], fixed(halves(0, 1)), fixed(halves(1, 0)))
    text = legend(comparison, "CLIP", "<b>mine</b>")
    assert "25.0 %" in text and "75.0 %" in text
    assert "<script>" not in text and "&lt;script&gt;" in text and "<b>" not in text
    np.testing.assert_array_equal(prediction.labels, halves(1, 0))


def test_opacity_blends_from_the_photo_to_the_colours_of_the_classes():
    comparison, _ = compare(PHOTO, ["sky", "sea"], fixed(halves(0, 0)), fixed(halves(0, 1, 20)))
    for picture in pictures(comparison, ALL_CLASSES, 0.0):
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(PHOTO))
    left, right = (np.asarray(picture) for picture in pictures(comparison, ALL_CLASSES, 1.0))
    assert (left == palette(2)[0]).all()
    assert (right[:, :20] == palette(2)[0]).all() and (right[:, 20:] == palette(2)[1]).all()


def test_heat_map_is_brightest_where_the_class_scores_highest():
    scores = np.zeros((2, 4, 4), np.float32)
    scores[1, 3, 0] = 0.3
    comparison, _ = compare(PHOTO, ["sky", "sea"], fixed(halves(0, 1)), fixed(halves(0, 1), scores))
    heat = np.asarray(pictures(comparison, "sea", 1.0)[1]).sum(axis=2)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert row >= 22 and column < 10
    assert heat[0, -1] == heat.min()


def test_large_photo_is_shown_small_but_its_label_map_keeps_its_size():
    photo = Image.new("RGB", (3000, 1000))
    labels = np.zeros((1000, 3000), int)
    labels[:, 1500:] = 1
    comparison, prediction = compare(photo, ["sky", "sea"], fixed(labels), fixed(labels))
    assert prediction.labels.shape == (1000, 3000)
    assert comparison.photo.shape == (427, 1280, 3)
    assert comparison.left.labels.shape == (427, 1280)
    np.testing.assert_allclose(comparison.left.shares, [0.5, 0.5])


def test_one_model_on_both_sides_runs_once():
    calls = []

    def segment(photo, classes, quality):
        calls.append(photo)
        return fixed(halves(0, 0))(photo, classes, quality)

    compare(PHOTO, ["sky"], segment, segment)
    assert len(calls) == 1


def test_class_called_like_the_choice_of_all_classes_does_not_hide_the_label_maps():
    comparison, _ = compare(PHOTO, [ALL_CLASSES, "sea"], fixed(halves(1, 1)), fixed(halves(1, 1)))
    assert (np.asarray(pictures(comparison, ALL_CLASSES, 1.0)[0]) == palette(2)[1]).all()
