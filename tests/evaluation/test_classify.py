"""Mask classification on small features against naive loops; masks from label maps, segments and files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from helpers.fake_data import annotation, pixels
from helpers.mask_classes import HEIGHT, NUM_CLASSES, WIDE, WIDTH, entries, some_masks
from pixelclip.data.annotations import decode_masks
from pixelclip.distributed import SINGLE_PROCESS
from pixelclip.evaluation import classify
from pixelclip.evaluation.classify import GivenMasks, classify_masks, majority, segment_masks, truth_masks
from pixelclip.evaluation.confusion import CLIP, OURS, ConfusionMatrix, EvaluationCounts, Predictions


def decoded(annotations: list) -> np.ndarray:
    return decode_masks({"annotations": annotations}).transpose(2, 0, 1).astype(bool)


def naive(
    features: torch.Tensor,
    masks: np.ndarray,
    classes: torch.Tensor,
    truth: np.ndarray,
) -> tuple[np.ndarray, int, int]:
    """Compute painted map, correct masks and labelled masks of one tower, mask by mask and pixel by pixel."""
    large = F.interpolate(features[None], (HEIGHT, WIDTH), mode="bilinear", align_corners=False)[0]
    names, hits, counted = [], 0, 0
    for mask in masks:
        pooled = torch.stack([large[:, y, x] for y, x in zip(*np.nonzero(mask), strict=True)]).mean(dim=0)
        names.append(max(range(len(classes)), key=lambda k: F.cosine_similarity(pooled, classes[k], dim=0).item()))
        votes = [int(v) for v in truth[mask] if v != 255]
        if votes:
            counted += 1
            hits += names[-1] == max(sorted(set(votes)), key=votes.count)
    painted = np.full(truth.shape, len(classes))
    for y in range(HEIGHT):
        for x in range(WIDTH):
            above = [(mask.sum(), name) for mask, name in zip(masks, names, strict=True) if mask[y, x]]
            if above:
                painted[y, x] = min(above)[1]
    return painted, hits, counted


@pytest.mark.parametrize("pixels_at_once", [1, 3 * HEIGHT * WIDTH, 1 << 25])
def test_mask_classification_equals_a_naive_loop(monkeypatch, pixels_at_once):
    monkeypatch.setattr(classify, "_PIXELS_AT_ONCE", pixels_at_once)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, WIDE, 4, 6, generator=generator)
    classes = F.normalize(torch.randn(NUM_CLASSES, WIDE, generator=generator), dim=1)
    truth = np.random.default_rng(1).choice([0, 1, 2, 4, 255], (HEIGHT, WIDTH)).astype(np.uint8)
    masks = some_masks()
    assert len(set(masks.sum(axis=(1, 2)).tolist())) == len(masks)  # the painting order is unique
    truth[masks[0]] = 255
    predictions = classify_masks(features, entries(masks), classes, truth)
    for tower in range(2):
        painted, hits, counted = naive(features[tower], masks, classes, truth)
        assert np.array_equal(predictions.label_maps[tower], painted)
        assert (predictions.correct_masks[tower], predictions.num_masks) == (hits, counted)
    assert predictions.num_masks == len(masks) - 1
    assert (predictions.label_maps[0] == NUM_CLASSES).any()


def test_image_without_masks_has_no_prediction():
    predictions = classify_masks(torch.randn(1, WIDE, 4, 6), [], torch.randn(NUM_CLASSES, WIDE), np.zeros((3, 4), np.uint8))
    assert (predictions.label_maps[0] == NUM_CLASSES).all()
    assert (predictions.correct_masks, predictions.num_masks) == ([0], 0)


def test_pixels_without_a_mask_count_as_wrong():
    confusion = ConfusionMatrix.zeros(2)
    confusion.add(np.array([[0, 0, 1, 1, 255]]), np.array([[0, 2, 1, 2, 2]]))  # 2 means no prediction
    np.testing.assert_allclose(confusion.iou(), [1 / 2, 1 / 2])
    assert confusion.miou() == confusion.pixel_accuracy() == 50


def test_majority_equals_hand_computed_classes():
    truth = np.array([[0, 1, 1, 255, 255, 255]], np.uint8)
    masks = np.array([[[1, 1, 1, 1, 1, 1]], [[1, 1, 0, 0, 0, 0]], [[0, 0, 0, 1, 1, 0]], [[0, 0, 0, 0, 0, 0]]], bool)
    assert majority(masks, truth).tolist() == [1, 0, 255, 255]  # the lowest class on a tie


def test_truth_masks_are_one_per_class():
    labels = np.array([[3, 3, 255], [1, 3, 255]], np.uint8)
    assert np.array_equal(decoded(truth_masks(labels)), [labels == 1, labels == 3])
    assert truth_masks(np.full((2, 2), 255, np.uint8)) == []


def test_segments_partition_the_image():
    masks = decoded(segment_masks(Image.fromarray(pixels(40, 60)), 50.0, 0.5, 20))
    assert len(masks) >= 4
    assert (masks.sum(axis=0) == 1).all()


def test_given_masks_are_read_without_empty_ones(tmp_path):
    masks = some_masks()
    masks[4] = False
    (tmp_path / "a.json").write_bytes(annotation(masks))
    assert np.array_equal(decoded(GivenMasks(str(tmp_path)).read("a", (WIDTH, HEIGHT))), np.delete(masks, 4, axis=0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a\.json: No such file"),
        (b"{", r"a\.json: unreadable JSON"),
        (annotation(np.ones((1, 4, 4))), r"a\.json: mask has size 4x4, but the image is 31x23"),
    ],
    ids=["missing", "no JSON", "another size"],
)
def test_unusable_mask_file_is_rejected_with_its_name(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        GivenMasks(str(tmp_path)).read("a", (WIDTH, HEIGHT))


def test_counts_survive_save_and_load(tmp_path):
    random = np.random.default_rng(0)
    truths = [random.choice([0, 1, 255], (4, 5)).astype(np.uint8) for _ in range(3)]
    predictions = [Predictions([random.integers(0, 3, (4, 5)) for _ in range(2)], [1, 0], 2) for _ in truths]
    counts = EvaluationCounts.zeros([OURS, CLIP], 2, next_index=7)
    counts.add(truths, predictions)
    counts.add_recalled(truths, torch.rand(3, 2))
    counts.bad_samples.append("x.png: broken")
    counts.save(tmp_path / "t.npz")
    loaded = EvaluationCounts.zeros([OURS, CLIP], 2, next_index=0)
    loaded.load(tmp_path / "t.npz")
    loaded.all_reduce(SINGLE_PROCESS)
    assert (loaded.next_index, loaded.bad_samples) == (7, ["x.png: broken"])
    assert counts.masks.tolist() == [3, 0, 6]
    for name, array in counts.arrays().items():
        assert array.any()
        assert np.array_equal(array, loaded.arrays()[name])
