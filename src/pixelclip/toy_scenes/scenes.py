"""Paint scenes with a pixel-exact label map and one incomplete caption each.

A scene is stuff (sky, sea, brick wall ...) with things (house, dog, balloon ...) in front of it. Colour alone does not
determine the class: sky, sea, cars and balloons can all be blue; snow, clouds and boats can all be white. Training uses
images (and captions for the toy CLIP); the label map is for evaluation only.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixelclip.toy_scenes.motifs import AIRBORNE, KINDS, TEXTURES, Canvas, Random, corners

THINGS = tuple(KINDS)
CLASSES: tuple[str, ...] = (*TEXTURES, *THINGS)

MIN_FRACTION = 0.02  # minimum pixel fraction of each class; otherwise the scene is repainted


@dataclass(frozen=True)
class Scene:
    """One painted scene.

    Attributes:
        image: RGB, uint8 [side, side, 3].
        label: Index into `CLASSES` of every pixel, uint8 [side, side].
        caption: A sentence that names some classes of the scene, and no absent ones.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    caption: str


def paint(seed: int, index: int, side: int = 128) -> Scene:
    """Paint one scene; the same arguments give the same scene in every process.

    Args:
        seed: Seed of the scenes, 0 or more.
        index: Index of the scene within the seed, 0 or more.
        side: Width and height in pixels, 32 to 512.

    Returns:
        The scene; each of its classes covers at least 2 % of the pixels.

    Raises:
        ValueError: If an argument is out of range.
    """
    if seed < 0 or index < 0 or not 32 <= side <= 512:
        raise ValueError(f"paint: seed {seed}, index {index}, side {side}; allowed: seed, index >= 0, side 32 to 512")
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    while True:
        canvas = Canvas(rng, side)
        _compose(canvas)
        fraction = np.bincount(canvas.label.ravel(), minlength=len(CLASSES)) / side**2
        if fraction[fraction > 0].min() >= MIN_FRACTION:
            return Scene(_develop(canvas), canvas.label, _caption([CLASSES[i] for i in np.flatnonzero(fraction)], rng))


def _compose(canvas: Canvas) -> None:
    """Paint stuff from the top down, then things from far to near."""
    rng, side = canvas.rng, canvas.side
    bands = _bands(rng)
    for name, top in bands:
        texture = TEXTURES[name](canvas)
        x = np.linspace(-0.05, 1.05, 45)
        y = np.full(45, top if top > 0 else -0.05)
        if name == "mountain":
            y += np.interp(x, np.linspace(-0.05, 1.05, 6), rng.uniform(-0.14, 0.14, 6)) + rng.normal(0, 0.008, 45)
        elif name in ("grass", "sand", "snow") and top > 0:
            y += 0.02 * np.sin(x * rng.uniform(4, 9) + rng.uniform(0, 6)) + 0.01 * np.sin(x * 17 + rng.uniform(0, 6))
        outline = np.concatenate([np.stack([x, y], 1), corners(1.05, 1.05, -0.05, 1.05)])
        canvas.polygon(CLASSES.index(name), outline * side, texture, 0)
    ground, horizon = bands[-1]
    if ground in ("grass", "sand", "snow") and rng.random() < 0.22:
        far, near = rng.uniform(0.15, 0.85), rng.uniform(0.2, 0.8)
        lane = corners(far - 0.06, horizon + 0.02, far + 0.06, horizon + 0.02, near + 0.42, 1.05, near - 0.42, 1.05)
        canvas.polygon(CLASSES.index("road"), lane * side, TEXTURES["road"](canvas), 0)
        bands.append(("road", horizon))
    for name, across, down in _arrangement({name for name, _ in bands}, horizon, rng):
        kind = KINDS[name]
        size = np.array([rng.uniform(*kind.width), rng.uniform(*kind.height)])
        centre = np.array([across, max(down - (name not in AIRBORNE) * size[1] / 2, size[1] / 2)])
        mirror = np.array([rng.choice([-1.0, 1.0]), 1.0])
        for part in kind.parts(rng):
            points = (centre + (part.points - 0.5) * size * mirror) * side
            canvas.polygon(CLASSES.index(name), points, part.colour, part.grain)


def _bands(rng: Random) -> list[tuple[str, float]]:
    """Draw the bands of stuff: names with their upper edge (0 top, 1 bottom), from the top down."""

    def pick(*names: str) -> str:
        return names[rng.integers(len(names))]

    layout = rng.random()
    if layout < 0.16:
        return [(pick("sky", "sea", "grass", "sand", "snow", "road", "brick wall"), 0.0)]
    if layout < 0.36:
        return [("brick wall", 0.0), (pick("road", "grass", "snow", "sand"), rng.uniform(0.5, 0.8))]
    if layout < 0.50:
        far, near = pick("sea", "grass", "snow", "sand", "road"), pick("sand", "grass", "snow", "road")
        return [(far, 0.0), (near, rng.uniform(0.35, 0.65))]
    horizon = rng.uniform(0.34, 0.64)
    if layout < 0.64:
        return [("sky", 0.0), ("sea", horizon - 0.1), (pick("sand", "grass", "snow", "road"), horizon + 0.16)]
    ground = (pick("grass", "snow", "sand", "road", "sea"), horizon)
    if layout < 0.82:
        return [("sky", 0.0), ("mountain", horizon - rng.uniform(0.18, 0.24)), ground]
    return [("sky", 0.0), ground]


def _arrangement(stuff: set[str], horizon: float, rng: Random) -> list[tuple[str, float, float]]:
    """Draw things with their position, far to near: the centre if airborne, else the foot."""
    weights = np.array([1.0 if KINDS[name].home & stuff else 0.25 for name in THINGS])
    weights[[THINGS.index("sun"), THINGS.index("cloud")]] = 1.5 if "sky" in stuff else 0  # occur only with sky
    number = rng.choice([1, 2, 3], p=[0.25, 0.45, 0.3])
    names = rng.choice(THINGS, number, replace=False, p=weights / weights.sum()).tolist()
    if rng.random() < 0.15 and names[0] != "sun":
        names.append(names[0])
    slots = np.clip((rng.permutation(len(names)) + rng.uniform(0.2, 0.8, len(names))) / len(names), 0.14, 0.86)
    depth = max(horizon, 0.45)
    placed = []
    for name, x in zip(names, slots.tolist(), strict=True):
        high = rng.uniform(0.14, 0.55) if "sky" in stuff else rng.uniform(0.2, 0.75)
        placed.append((name, x, high if name in AIRBORNE else rng.uniform(depth + 0.15, 0.98)))
    return sorted(placed, key=lambda item: (item[0] not in AIRBORNE, item[2]))


def _develop(canvas: Canvas) -> NDArray[np.uint8]:
    """Simulate a camera: light from one side, exposure, white balance, contrast, sensor noise."""
    rng, side = canvas.rng, canvas.side
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    slope = rng.uniform(-0.1, 0.1, 2).astype(np.float32)
    light = rng.uniform(0.85, 1.12) + slope[0] * axis[:, None] + slope[1] * axis
    image = np.clip(canvas.image, 0, 1) * light[..., None] * rng.uniform(0.94, 1.06, 3).astype(np.float32)
    grey = image.mean(-1, keepdims=True)
    image = grey + (image - grey) * rng.uniform(0.75, 1.15)
    image = 0.5 + (image - 0.5) * rng.uniform(0.85, 1.1) + rng.uniform(0.005, 0.02) * canvas.noise(0)[..., None]
    picture: NDArray[np.uint8] = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    return picture


_PHRASES = (
    "a photo of {}", "a photo of {}", "a photo of {}", "a picture of {}", "{}", "{}", "{}", "{} in the scene",
    "a photo of {} in the scene", "a scene with {}", "itap of {}.", "a bad photo of {}.", "there is {}",
    "{} in a video game.", "art of {}.", "{}, seen today", "an origami scene of {}", "look at {}", "a painting of {}",
)  # fmt: skip
_ADJECTIVES = ("small", "large", "nice", "old", "lovely", "little", "big", "origami")
_UNCOUNTED = frozenset({"grass", "sand", "snow", "sky", "sea", "sun"})
_RELATION = {"sky": "under", "sea": "on", "grass": "on", "sand": "on", "snow": "in", "road": "on",
             "brick wall": "by", "mountain": "near"}  # fmt: skip


def _caption(present: list[str], rng: Random) -> str:
    """Write a sentence about a random subset of the present classes, in random order."""
    named = [name for name in rng.permutation(present).tolist() if rng.random() < 0.7]
    named = named or [present[rng.integers(len(present))]]
    nouns: list[str] = []
    for name in named:
        if rng.random() < 0.12:
            name = f"{_ADJECTIVES[rng.integers(len(_ADJECTIVES))]} {name}"
        article = "the" if named[len(nouns)] in _UNCOUNTED or rng.random() < 0.25 else "a"
        nouns.append(f"an {name}" if article == "a" and name[0] in "aeiou" else f"{article} {name}")
    last = nouns.pop()
    relation = _RELATION.get(named[-1], "and") if named[0] in THINGS else "and"
    listed = ", ".join(nouns)
    sentence = f"{listed} {relation if rng.random() < 0.6 else 'and'} {last}" if nouns else last
    return _PHRASES[rng.integers(len(_PHRASES))].format(sentence)
