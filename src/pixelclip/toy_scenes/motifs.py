"""Motifs of the painted scenes: a canvas, textures of stuff, shapes of things."""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Floats = NDArray[np.float32]
Random = np.random.Generator


class Part(NamedTuple):
    """A polygon [n, 2] in the unit box of its thing (x right, y down), its colour and the amplitude of its speckle."""

    points: NDArray[np.float64]
    colour: Floats
    grain: float = 0.05


@dataclass
class Canvas:
    """The image being painted, its label map and the random generator."""

    rng: Random
    side: int
    image: Floats = field(init=False)  # [side, side, 3], 0 to 1
    label: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        self.image = np.zeros((self.side, self.side, 3), np.float32)
        self.label = np.zeros((self.side, self.side), np.uint8)

    def noise(self, scale: int) -> Floats:
        """Return a random window [side, side] of smooth noise, about -1 to 1; `scale` 0 is the finest, 3 the coarsest."""
        y, x = self.rng.integers(0, self.side, 2)
        return _noise_bank(self.side)[scale, y : y + self.side, x : x + self.side]

    def polygon(self, label: int, points: NDArray[np.float64], colour: Floats, grain: float) -> None:
        """Paint a polygon [n, 2], in pixels, with a soft edge; `colour` is [3] or a texture [side, side, 3]."""
        left, top = np.clip(np.floor(points.min(0)).astype(int), 0, self.side)
        right, bottom = np.clip(np.ceil(points.max(0)).astype(int) + 1, 0, self.side)
        if right <= left or bottom <= top:
            return
        mask = Image.new("L", (int(right - left) * 2, int(bottom - top) * 2))
        ImageDraw.Draw(mask).polygon(((points - (left, top)) * 2).ravel().tolist(), fill=255)
        alpha = np.asarray(mask.reduce(2), np.float32)[..., None] / 255
        window = np.s_[top:bottom, left:right]
        if colour.ndim == 1:
            fall = np.linspace(1.08, 0.92, bottom - top, dtype=np.float32)[:, None]  # light comes from above
            colour = colour * (fall + grain * self.noise(0)[window] + grain * self.noise(1)[window])[..., None]
        else:
            colour = colour[window]
        self.image[window] += alpha * (colour - self.image[window])
        self.label[window][alpha[..., 0] >= 0.5] = label


@lru_cache(maxsize=4)
def _noise_bank(side: int) -> Floats:
    """Return smooth noise at four scales, [4, 2 side, 2 side]."""
    rng = np.random.Generator(np.random.PCG64(7))
    bank = []
    for cells in (128, 48, 16, 5):
        grid = Image.fromarray(rng.standard_normal((2 * cells, 2 * cells)).astype(np.float32))
        bank.append(np.asarray(grid.resize((2 * side, 2 * side), Image.Resampling.BICUBIC)))
    return np.clip(np.stack(bank) * 0.6, -1.5, 1.5)


def _tint(rng: Random, *palette: tuple[int, int, int], spread: float = 0.05) -> Floats:
    """Draw a colour [3] near one of the palette (0 to 255)."""
    base = np.array(palette[rng.integers(len(palette))], np.float32) / 255
    return np.clip(base * rng.uniform(0.88, 1.1) + rng.uniform(-spread, spread, 3), 0.02, 1).astype(np.float32)


def _dye(rng: Random, *palette: tuple[int, int, int]) -> Floats:
    """Draw a colour of the palette, or with probability 1/6 any colour."""
    if rng.random() > 1 / 6:
        return _tint(rng, *palette, spread=0.07)
    return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.4, 0.9), rng.uniform(0.5, 0.98)), np.float32)


def _sky(canvas: Canvas) -> Floats:
    rng = canvas.rng
    blue = ((64, 128, 214), (176, 212, 242))
    zenith, horizon = (blue, blue, blue, ((150, 158, 172), (206, 210, 216)), ((92, 84, 150), (246, 164, 110)),
                       ((24, 36, 84), (84, 104, 158)))[rng.integers(6)]  # fmt: skip
    fall = np.linspace(0, 1, canvas.side, dtype=np.float32)[:, None, None] * rng.uniform(1.1, 1.9)
    high, low = _tint(rng, zenith), _tint(rng, horizon)
    return high + (low - high) * np.clip(fall, 0, 1) + 0.025 * canvas.noise(3)[..., None]


def _sea(canvas: Canvas) -> Floats:
    rows = np.linspace(0, 1, canvas.side, dtype=np.float32)[:, None]
    waves = np.sin((rows**0.8 * canvas.rng.uniform(55, 90) + 1.6 * canvas.noise(2)) + 1.2 * canvas.noise(3))
    shade = 1 + 0.14 * waves + 0.06 * canvas.noise(1) - 0.15 * rows
    foam = 0.28 * np.clip(waves + 0.8 * canvas.noise(1) - 0.95, 0, 1)
    base = _tint(canvas.rng, (30, 92, 158), (44, 122, 172), (38, 128, 138), (84, 110, 128))
    return base * shade[..., None] + foam[..., None]


def _grass(canvas: Canvas) -> Floats:
    base = _tint(canvas.rng, (86, 146, 52), (112, 158, 60), (62, 118, 50), (150, 152, 70))
    blades = canvas.noise(0) * np.roll(canvas.noise(0), 1, 0)
    return base * (1 + 0.22 * canvas.noise(0) + 0.12 * blades + 0.10 * canvas.noise(2))[..., None]


def _sand(canvas: Canvas) -> Floats:
    rows = np.linspace(0, 1, canvas.side, dtype=np.float32)[:, None]
    ripples = np.sin(rows * canvas.rng.uniform(30, 50) + 2.5 * canvas.noise(3)) * canvas.rng.uniform(0, 0.05)
    base = _tint(canvas.rng, (226, 198, 142), (206, 176, 124), (234, 216, 178), (188, 150, 104))
    return base * (1 + ripples + 0.07 * canvas.noise(0) + 0.04 * canvas.noise(2))[..., None]


def _snow(canvas: Canvas) -> Floats:
    drift = np.clip(canvas.noise(3) + 0.5 * canvas.noise(2), -1, 1)[..., None]
    blue = np.array([0.10, 0.06, 0.0], np.float32)
    base = _tint(canvas.rng, (236, 240, 246), (222, 230, 242), (244, 240, 236), spread=0.02)
    return base - np.clip(drift, 0, 1) * blue - 0.04 * drift + 0.025 * canvas.noise(0)[..., None]


def _road(canvas: Canvas) -> Floats:
    side, rng = canvas.side, canvas.rng
    base = _tint(rng, (92, 94, 98), (120, 120, 122), (72, 74, 82), (140, 132, 124), spread=0.02)
    texture: Floats = base * (1 + 0.10 * canvas.noise(0) + 0.05 * canvas.noise(3))[..., None]
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    along = x - rng.uniform(-0.4, 0.4) * y
    for lane in rng.uniform(0.68, 0.92) - np.array([0.0, 0.3]):
        dash = (np.abs(y - lane + 0.03 * (x - 0.5)) < 0.016) & (along * rng.uniform(3, 4.5) % 1 < 0.6)
        texture[dash] = _tint(rng, (232, 228, 214), (228, 190, 70))
    return texture


def _brick_wall(canvas: Canvas) -> Floats:
    side, rng = canvas.side, canvas.rng
    base = _tint(rng, (166, 84, 62), (142, 72, 60), (180, 120, 88), (150, 146, 142), (206, 190, 164), (222, 218, 210))
    high = max(4, round(side * rng.uniform(0.055, 0.095)))
    wide = round(high * rng.uniform(1.9, 2.4))
    y, x = np.mgrid[:side, :side]
    row = y // high
    x = x + row % 2 * (wide // 2)
    joint = (y % high < max(1, high // 7)) | (x % wide < max(1, high // 7))
    brick = rng.normal(1, 0.09, (side // high + 1, side // wide + 2)).astype(np.float32)[row, x // wide]
    texture: Floats = base * (brick + 0.06 * canvas.noise(0))[..., None]
    texture[joint] = _tint(rng, (206, 200, 190), (120, 112, 106)) if base.mean() < 0.72 else base * 0.72
    return texture


def _mountain(canvas: Canvas) -> Floats:
    base = _tint(canvas.rng, (112, 112, 122), (128, 106, 90), (92, 108, 136), (96, 112, 88))
    slope = np.clip(canvas.noise(2) + 0.6 * canvas.noise(1), -1, 1)
    return base * (1 + 0.24 * slope + 0.08 * canvas.noise(0))[..., None]


TEXTURES: dict[str, Callable[[Canvas], Floats]] = {
    "sky": _sky, "sea": _sea, "grass": _grass, "sand": _sand, "snow": _snow, "road": _road,
    "brick wall": _brick_wall, "mountain": _mountain,
}  # fmt: skip


def _oval(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    u, v = rx * np.cos(angle), ry * np.sin(angle)
    return np.stack([x + u * np.cos(turn) - v * np.sin(turn), y + u * np.sin(turn) + v * np.cos(turn)], 1)


def corners(*flat: float) -> NDArray[np.float64]:
    """Return points [n, 2] of x, y, x, y ..."""
    return np.array(flat, np.float64).reshape(-1, 2)


def _box(x0: float, y0: float, x1: float, y1: float) -> NDArray[np.float64]:
    return corners(x0, y0, x1, y0, x1, y1, x0, y1)


def _house(rng: Random) -> list[Part]:
    wall = _dye(rng, (238, 214, 170), (214, 120, 96), (240, 236, 226), (176, 204, 220))
    trim = _tint(rng, (240, 238, 230), (70, 52, 44))
    glass, roof = _tint(rng, (70, 90, 112), (244, 220, 140)), _tint(rng, (150, 62, 48), (84, 78, 82), (112, 78, 56))
    eaves = rng.uniform(0.34, 0.44)
    ridge = (0.5, 0.5) if rng.random() < 0.6 else (0.22, 0.78)
    parts = [Part(_box(0.70, 0.06, 0.80, 0.4), roof * 0.8), Part(_box(0.07, eaves - 0.03, 0.93, 1), wall)]
    parts += [Part(_box(0.07, y, 0.93, y + 0.012), wall * 0.86, 0) for y in np.arange(eaves + 0.05, 0.98, 0.085)]
    parts += [Part(corners(0, eaves, ridge[0], 0.02, ridge[1], 0.02, 1, eaves), roof, 0.1)]
    door = rng.uniform(0.4, 0.46)
    parts += [Part(_box(door, 0.66, door + 0.16, 1), _dye(rng, (96, 60, 40), (60, 90, 130)))]
    for x in (0.15, 0.69):
        parts += [Part(_box(x - 0.02, 0.53, x + 0.18, 0.77), trim, 0), Part(_box(x, 0.55, x + 0.16, 0.75), glass, 0)]
        parts += [Part(_box(x + 0.07, 0.55, x + 0.09, 0.75), trim, 0)]
    return parts


def _tree(rng: Random) -> list[Part]:
    leaf = _tint(rng, (52, 110, 44), (74, 132, 52), (38, 84, 50), (196, 128, 44), (176, 74, 44), (120, 140, 56))
    trunk = _tint(rng, (98, 68, 44), (124, 98, 74))
    parts = [Part(corners(0.44, 0.5, 0.56, 0.5, 0.60, 1, 0.40, 1), trunk, 0.15)]
    if rng.random() < 0.35:
        for top, wide in ((0.36, 0.46), (0.18, 0.38), (0.0, 0.28)):
            bottom = top + 0.46
            spikes = corners(0.5, top, 0.5 + wide, bottom, 0.5, bottom - 0.06, 0.5 - wide, bottom)
            parts.append(Part(spikes, leaf * (1.15 - 0.4 * top), 0.28))
        return parts
    for x, y, r in ((0.26, 0.46, 0.25), (0.74, 0.46, 0.25), (0.34, 0.24, 0.25), (0.66, 0.26, 0.25), (0.5, 0.42, 0.28)):
        x, y = x + rng.uniform(-0.04, 0.04), y + rng.uniform(-0.03, 0.03)
        parts.append(Part(_oval(x, y, r, r * 0.9), leaf * rng.uniform(0.88, 1.14), 0.32))
    return parts


def _boat(rng: Random) -> list[Part]:
    hull, band = _dye(rng, (240, 240, 238), (176, 46, 44), (40, 78, 150), (120, 78, 48)), _dye(rng, (240, 220, 120))
    if rng.random() < 0.7:
        sail = _tint(rng, (246, 244, 236), (246, 244, 236), (240, 226, 190), (200, 70, 60))
        parts = [Part(_box(0.485, 0, 0.515, 0.8), _tint(rng, (96, 70, 50)), 0)]
        parts += [Part(corners(0.54, 0.04, 0.94, 0.68, 0.54, 0.70), sail)]
        parts += [Part(corners(0.46, 0.12, 0.14, 0.69, 0.46, 0.70), sail * 0.92)]
    else:
        cabin = _tint(rng, (240, 240, 236), (214, 190, 150))
        parts = [Part(_box(0.54, 0.2, 0.66, 0.5), band), Part(_box(0.28, 0.42, 0.74, 0.8), cabin)]
        parts += [Part(_oval(x, 0.56, 0.05, 0.06), _tint(rng, (60, 84, 110)), 0) for x in (0.38, 0.51, 0.64)]
    parts += [Part(corners(0, 0.70, 1, 0.68, 0.86, 1, 0.16, 1), hull), Part(_box(0.04, 0.74, 0.95, 0.79), band, 0)]
    return parts


def _car(rng: Random) -> list[Part]:
    body = _dye(rng, (196, 40, 40), (44, 92, 176), (60, 132, 84), (238, 238, 236), (70, 72, 80))
    glass = _tint(rng, (60, 76, 92), (150, 180, 200))
    tyre, rim = _tint(rng, (34, 34, 38), spread=0.01), _tint(rng, (190, 192, 198))
    front, top = rng.uniform(0.22, 0.34), rng.uniform(0.0, 0.08)
    back = rng.uniform(0.74, 0.92)
    parts = [Part(corners(front - 0.12, 0.46, front, top, back - 0.08, top, back + 0.04, 0.46), body)]
    parts += [Part(corners(front - 0.06, 0.42, front + 0.03, 0.1, 0.52, 0.1, 0.52, 0.42), glass, 0)]
    parts += [Part(corners(0.56, 0.42, 0.56, 0.1, back - 0.11, 0.1, back - 0.03, 0.42), glass, 0)]
    nose = corners(0, 0.54, 0.06, 0.44, 0.95, 0.40, 1, 0.54, 1, 0.82, 0, 0.82)
    parts += [Part(nose, body), Part(_box(0.0, 0.52, 0.06, 0.62), _tint(rng, (250, 236, 170)), 0)]
    for x in (0.22, 0.77):
        parts += [Part(_oval(x, 0.8, 0.115, 0.21), tyre, 0), Part(_oval(x, 0.8, 0.055, 0.1), rim, 0)]
    return parts


def _sun(rng: Random) -> list[Part]:
    disc = _tint(rng, (254, 222, 84), (255, 240, 170), (250, 176, 72), (240, 112, 70))
    angles = np.arange(0, 2 * np.pi, 2 * np.pi / rng.integers(9, 14))
    rays = [Part(corners(0.5 + 0.5 * np.cos(a), 0.5 + 0.5 * np.sin(a), 0.5 + 0.3 * np.cos(a + 0.26),
                          0.5 + 0.3 * np.sin(a + 0.26), 0.5 + 0.3 * np.cos(a - 0.26), 0.5 + 0.3 * np.sin(a - 0.26)),
                  disc * 0.97, 0) for a in angles]  # fmt: skip
    radius = 0.36 if rng.random() < 0.7 else 0.46
    return (rays if radius < 0.4 else []) + [Part(_oval(0.5, 0.5, radius, radius), disc, 0.02)]


def _cloud(rng: Random) -> list[Part]:
    vapour = _tint(rng, (248, 250, 252), (236, 240, 246), (178, 184, 196), (248, 218, 206), spread=0.02)
    puffs = [(0.2, 0.66, 0.2, 0.3), (0.82, 0.68, 0.18, 0.28), (0.38, 0.4, 0.22, 0.38), (0.64, 0.44, 0.24, 0.4)]
    parts = [Part(_oval(x + rng.uniform(-0.03, 0.03), y, rx, ry), vapour, 0.03) for x, y, rx, ry in puffs]
    return [*parts, Part(_oval(0.5, 0.74, 0.42, 0.26), vapour * 0.97, 0.03)]


def _person(rng: Random) -> list[Part]:
    skin = _tint(rng, (240, 198, 166), (206, 150, 112), (142, 96, 66), (92, 60, 44))
    hair = _tint(rng, (46, 34, 28), (120, 76, 42), (226, 190, 110))
    shirt = _dye(rng, (200, 60, 60), (70, 120, 190), (90, 150, 90), (240, 200, 90), (236, 236, 236))
    legs = _dye(rng, (52, 70, 110), (60, 58, 62), (150, 130, 100))
    lift = rng.uniform(-0.16, 0.12)
    parts = [Part(_oval(0.5, 0.10, 0.21, 0.105), hair)]
    if rng.random() < 0.35:
        parts += [Part(_box(x, 0.7, x + 0.13, 0.99), skin) for x in (0.31, 0.56)]
        parts += [Part(corners(0.32, 0.5, 0.68, 0.5, 0.86, 0.78, 0.14, 0.78), legs)]
    else:
        parts += [Part(corners(0.26, 0.54, 0.5, 0.54, 0.48, 0.98, 0.22, 0.98), legs)]
        parts += [Part(corners(0.5, 0.54, 0.74, 0.54, 0.78, 0.98, 0.52, 0.98), legs)]
    for x, out in ((0.27, -0.2), (0.73, 0.2)):
        hand = 0.5 + (lift if out > 0 else 0.02)
        parts += [Part(corners(x, 0.24, x - out * 0.5, 0.30, x + out * 0.5, hand, x + out * 1.2, hand), shirt * 0.9)]
        parts += [Part(_oval(x + out * 0.9, hand + 0.02, 0.09, 0.035), skin, 0)]
    parts += [Part(corners(0.24, 0.22, 0.76, 0.22, 0.74, 0.58, 0.26, 0.58), shirt)]
    return [*parts, Part(_box(0.42, 0.16, 0.58, 0.24), skin), Part(_oval(0.5, 0.125, 0.17, 0.085), skin, 0.03)]


def _dog(rng: Random) -> list[Part]:
    fur = _tint(rng, (150, 100, 56), (206, 160, 100), (62, 52, 48), (236, 230, 220), (140, 136, 134))
    dark, patch = fur * 0.72, fur if rng.random() < 0.6 else _tint(rng, (70, 50, 40), (240, 236, 228))
    parts = [Part(corners(0.06, 0.06, 0.14, 0.10, 0.20, 0.50, 0.10, 0.52), fur)]
    parts += [Part(_box(x, 0.6, x + 0.09, 1), dark) for x in (0.22, 0.56)]
    parts += [Part(_oval(0.40, 0.54, 0.32, 0.2), fur, 0.14), Part(_oval(0.36, 0.47, 0.14, 0.11), patch, 0.14)]
    parts += [Part(_box(x, 0.6, x + 0.09, 1), fur) for x in (0.12, 0.64)]
    parts += [Part(_oval(0.78, 0.28, 0.17, 0.2), fur, 0.1), Part(_oval(0.91, 0.35, 0.1, 0.09), fur)]
    parts += [Part(_oval(0.68, 0.30, 0.06, 0.19, 0.25), dark), Part(_oval(0.98, 0.33, 0.03, 0.035), fur * 0.2, 0)]
    return [*parts, Part(_oval(0.82, 0.22, 0.025, 0.03), fur * 0.15, 0)]


def _bird(rng: Random) -> list[Part]:
    coat = _dye(rng, (70, 120, 196), (132, 94, 62), (190, 60, 52), (226, 226, 228))
    beak = _tint(rng, (244, 170, 50), (70, 64, 60))
    wing, belly = coat * 0.72, coat * 0.5 + 0.45
    tip = rng.uniform(-0.02, 0.2)
    parts = [Part(corners(0.30, 0.50, 0.0, 0.38, 0.04, 0.62, 0.30, 0.66), wing)]
    parts += [Part(corners(0.88, 0.34, 1.0, 0.40, 0.88, 0.46), beak, 0)]
    parts += [Part(_oval(0.50, 0.62, 0.29, 0.24, -0.2), coat, 0.1), Part(_oval(0.56, 0.72, 0.2, 0.13, -0.2), belly)]
    parts += [Part(_oval(0.78, 0.40, 0.13, 0.18), coat), Part(_oval(0.81, 0.36, 0.025, 0.035), coat * 0.1, 0)]
    return [*parts, Part(corners(0.34, 0.62, 0.12, tip, 0.36, tip + 0.06, 0.62, 0.56, 0.5, 0.68), wing, 0.14)]


def _balloon(rng: Random) -> list[Part]:
    skin = _dye(rng, (214, 44, 48), (240, 200, 56), (60, 110, 210), (232, 96, 156), (84, 170, 84))
    parts = [Part(corners(0.48, 0.74, 0.52, 0.74, 0.58, 0.88, 0.52, 1, 0.50, 1, 0.54, 0.88), skin * 0.4 + 0.3, 0)]
    parts += [Part(corners(0.5, 0.70, 0.59, 0.79, 0.41, 0.79), skin * 0.8, 0)]
    parts += [Part(_oval(0.5, 0.38, 0.46, 0.38), skin, 0.02), Part(_oval(0.62, 0.46, 0.3, 0.27), skin * 0.93, 0.02)]
    return [*parts, Part(_oval(0.33, 0.22, 0.08, 0.1, 0.6), skin * 0.4 + 0.58, 0)]


def _flower(rng: Random) -> list[Part]:
    stem = _tint(rng, (70, 130, 58), (96, 150, 70))
    petal = _dye(rng, (232, 92, 140), (246, 244, 240), (226, 66, 58), (142, 92, 196))
    heart = _tint(rng, (246, 200, 60), (110, 70, 40))
    parts = [Part(_box(0.465, 0.5, 0.535, 1), stem), Part(_oval(0.3, 0.80, 0.2, 0.06, 0.5), stem)]
    parts += [Part(_oval(0.7, 0.74, 0.2, 0.06, -0.5), stem * 0.9)]
    angles = rng.random() + np.arange(0, 2 * np.pi, 2 * np.pi / rng.integers(5, 9))
    parts += [Part(_oval(0.5 + 0.29 * np.cos(a), 0.33 + 0.2 * np.sin(a), 0.2, 0.1, a), petal * rng.uniform(0.9, 1.1))
              for a in angles]  # fmt: skip
    return [*parts, Part(_oval(0.5, 0.33, 0.16, 0.11), heart, 0.12)]


class Kind(NamedTuple):
    """Shape of a thing, its minimum and maximum width and height (fractions of the side), and the stuff it occurs with."""

    parts: Callable[[Random], list[Part]]
    width: tuple[float, float]
    height: tuple[float, float]
    home: frozenset[str]


KINDS = {
    "house": Kind(_house, (0.44, 0.62), (0.44, 0.62), frozenset({"grass", "snow", "road", "sand", "mountain"})),
    "tree": Kind(_tree, (0.37, 0.53), (0.55, 0.85), frozenset({"grass", "snow", "brick wall", "mountain"})),
    "boat": Kind(_boat, (0.48, 0.69), (0.44, 0.64), frozenset({"sea", "sand"})),
    "car": Kind(_car, (0.53, 0.74), (0.28, 0.37), frozenset({"road", "brick wall", "sand"})),
    "sun": Kind(_sun, (0.34, 0.46), (0.34, 0.46), frozenset({"sky"})),
    "cloud": Kind(_cloud, (0.48, 0.71), (0.25, 0.37), frozenset({"sky"})),
    "person": Kind(_person, (0.28, 0.38), (0.60, 0.86), frozenset({"road", "brick wall", "sand", "snow"})),
    "dog": Kind(_dog, (0.44, 0.62), (0.39, 0.51), frozenset({"grass", "sand", "snow", "road"})),
    "bird": Kind(_bird, (0.44, 0.60), (0.34, 0.46), frozenset({"sky", "sea", "brick wall"})),
    "balloon": Kind(_balloon, (0.29, 0.39), (0.41, 0.57), frozenset({"sky", "brick wall", "grass"})),
    "flower": Kind(_flower, (0.34, 0.48), (0.51, 0.74), frozenset({"grass", "brick wall", "snow"})),
}
AIRBORNE = frozenset({"sun", "cloud", "bird", "balloon"})
