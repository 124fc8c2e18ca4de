"""The model that `pixelclip.load` returns: photos as files, images or arrays, results that a notebook shows.

K classes, h w score grid, H W photo.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixelclip.config import Quality
from pixelclip.data.class_names import check_list, with_commas
from pixelclip.data.images import open_image, to_rgb, turn_upright
from pixelclip.inference.loading import Model
from pixelclip.inference.onnx_predictor import resized
from pixelclip.inference.prediction import Prediction, overlay, palette_image, png
from pixelclip.storage.download import local_path
from pixelclip.storage.files import check_writable, write_atomically

Photo = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
"""A path, URL or `s3://` URI of an image file, a PIL image, or RGB pixels uint8 [H, W, 3]."""
_SHOWN_EDGE = 1024  # longest edge in a notebook, in pixels


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The segmentation of one photo.

    Attributes:
        photo: the photo, upright RGB.
        names: the K class names as given.
        prediction: labels and scores.
    """

    photo: Image.Image
    names: list[str]
    prediction: Prediction

    @property
    def labels(self) -> NDArray[np.uint16]:
        """Indices into `names`, [H, W]."""
        return self.prediction.labels

    @property
    def scores(self) -> NDArray[np.float32]:
        """Cosines of photo and classes on a grid over the photo, [K, h, w]; `score_map` has the photo's size."""
        return self.prediction.scores

    @property
    def shares(self) -> dict[str, float]:
        """Fraction of the photo's pixels of every class, in the order of `names`."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.names))
        return {name: float(count / self.labels.size) for name, count in zip(self.names, counts, strict=True)}

    def score_map(self, name: str) -> NDArray[np.float32]:
        """Return the scores of one class at the photo's size, [H, W]; `labels` is the class with the highest one.

        Raises:
            ValueError: there is no such class.
        """
        if name not in self.names:
            raise ValueError(f"no class {name!r}; the classes are {', '.join(self.names)}")
        return resized(self.scores[self.names.index(name)], self.labels.shape)

    def overlay(self, opacity: float = 0.55) -> Image.Image:
        """Return the photo blended with the colours of its classes, above a legend; see `prediction.overlay`."""
        return overlay(self.photo, self.prediction, opacity)

    def label_image(self) -> Image.Image:
        """Return the label map as an image with a palette, see `prediction.palette_image`."""
        return palette_image(self.labels, len(self.names))

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write the label map as `NAME.png` and the overlay beside it as `NAME.overlay.png`; return both paths.

        Raises:
            ValueError: `path` is no .png file or cannot be written.
        """
        labels, shown = saved_files(path)
        check_writable(labels)
        write_atomically(labels, png(self.label_image()))
        write_atomically(shown, png(self.overlay()))
        return labels, shown

    def _repr_png_(self) -> bytes:
        shown = self.overlay()
        shown.thumbnail((_SHOWN_EDGE, _SHOWN_EDGE))
        return png(shown)


class Segmenter:
    """A loaded model; see `pixelclip.load`.

    Args:
        predictor: segments one PIL image.
    """

    def __init__(self, predictor: Model) -> None:
        self.predictor = predictor

    @overload
    def __call__(
        self, photo: list[Photo] | tuple[Photo, ...], classes: Sequence[str], quality: Quality = "fast"
    ) -> list[Segmentation]: ...

    @overload
    def __call__(self, photo: Photo, classes: Sequence[str], quality: Quality = "fast") -> Segmentation: ...

    def __call__(
        self, photo: Photo | list[Photo] | tuple[Photo, ...], classes: Sequence[str], quality: Quality = "fast"
    ) -> Segmentation | list[Segmentation]:
        """Segment a photo, or several.

        Args:
            photo: see `Photo`; a list gives a list of results, all in memory (for many files use `pixelclip.predict`).
            classes: class names; a bar separates synonyms of one class: `["dog|puppy", "grass"]`.
            quality: fast (one view of the whole photo, as in the paper) or best (refined, several times slower).

        Raises:
            ValueError: an unusable photo, class names or quality.
        """
        names = check_list(classes)
        if not isinstance(photo, list | tuple):
            return self._segment(photo, names, quality)
        results = []
        for number, each in enumerate(photo):
            try:
                results.append(self._segment(each, names, quality))
            except ValueError as error:
                raise ValueError(f"photo {number}: {error}") from None
        return results

    def _segment(self, photo: Photo, names: list[str], quality: Quality) -> Segmentation:
        image = _opened(photo)
        prediction = self.predictor(image, [with_commas(name) for name in names], quality)
        return Segmentation(image, names, prediction)


def saved_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the files that `Segmentation.save` writes; raise ValueError if `path` is no .png file."""
    labels = Path(path)
    if labels.suffix.lower() != ".png":
        raise ValueError(f"{labels}: the label map must be a .png file")
    return labels, labels.with_suffix(".overlay.png")


def _opened(photo: Photo) -> Image.Image:
    if isinstance(photo, str | os.PathLike):
        return open_image(local_path(os.fspath(photo)))
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
            raise ValueError(f"array: expected uint8 [H, W, 3], found {photo.dtype} {[*photo.shape]}")
        return Image.fromarray(photo)
    if isinstance(photo, Image.Image):
        return to_rgb(turn_upright(photo))
    raise ValueError(f"photo: expected a path, a PIL image or a uint8 array [H, W, 3], found {type(photo).__name__}")
