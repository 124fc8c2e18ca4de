"""Small images, annotations, tars and folders that several tests use as inputs."""

import io
import json
import os
import signal
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle


def pixels(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Create an image of four flat quarters with a little noise."""
    generator = np.random.default_rng(seed)
    quarters = generator.integers(0, 256, (2, 2, 3))
    image = quarters[(np.arange(height) * 2 // height)[:, None], np.arange(width) * 2 // width]
    return np.clip(image + generator.integers(-2, 3, image.shape), 0, 255).astype(np.uint8)


def encoded(image: NDArray[Any] | Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def black_png(edge: int) -> bytes:
    """Encode a black image of edge x edge pixels, which compresses a thousandfold."""
    rows = zlib.compressobj(9)
    data = b"".join([*(rows.compress(bytes(edge + 1)) for _ in range(edge)), rows.flush()])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", edge, edge, 8, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    framed = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def bomb(kind: str, edge: int) -> bytes:
    """Create an image that says 16 x 16 pixels, or nothing (EPS), but from which edge x edge pixels would be decoded."""
    png = black_png(edge) if kind in ("ICO", "ICNS") else b""
    if kind == "ICO":
        return struct.pack("<HHH BBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png
    if kind == "ICNS":
        return b"icns" + struct.pack(">I", len(png) + 16) + b"ic07" + struct.pack(">I", len(png) + 8) + png
    if kind == "EPS":
        return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 {edge} {edge}\n%%EndComments\nshowpage\n".encode()
    rows = zlib.compressobj(9)  # a TIFF of one tile
    data = b"".join([*(rows.compress(bytes(edge)) for _ in range(edge)), rows.flush()])
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, edge), (323, edge), (324, 134)]
    tags.append((325, len(data)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def turned(orientation: int) -> Image.Exif:
    """Return EXIF data that turn or mirror an image (1: neither)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def annotation(masks: NDArray[Any]) -> bytes:
    """Encode masks [N, H, W] as SA-1B's annotation JSON."""
    codes = [rle.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    entries = [
        {"segmentation": {"size": list(c["size"]), "counts": c["counts"].decode()}, "area": int(rle.area(c))} for c in codes
    ]
    return json.dumps({"image": {"image_id": 0}, "annotations": entries}).encode()


def write_tar(path: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_tar(path: Path) -> dict[str, bytes]:
    """Read every file of a tar with the standard library."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def die(*_: object, **__: object) -> None:
    """Kill this process, as the kernel does when memory runs out. Worker processes import this small file quickly."""
    os.kill(os.getpid(), signal.SIGKILL)
