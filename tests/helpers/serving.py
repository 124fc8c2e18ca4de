"""Requests to a served model."""

import base64
import io
import json
import urllib.error
import urllib.request

import numpy as np
from PIL import Image


def photo(width: int, height: int, seed: int) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def decoded(image: bytes | str) -> Image.Image:
    """Decode an image file, or the base64 of one."""
    return Image.open(io.BytesIO(base64.b64decode(image) if isinstance(image, str) else image))


def body_of(rows: list[tuple[bytes, str]], **params: bool) -> bytes:
    """Return the body of a request, without `params` if there are none."""
    data = [[base64.b64encode(image).decode(), classes] for image, classes in rows]
    table = {"dataframe_split": {"columns": ["image", "classes"], "data": data}}
    return json.dumps(table | ({"params": params} if params else {})).encode()


def ask(address: str, rows: list[tuple[bytes, str]], seconds: float = 60, **params: bool) -> tuple[int, dict]:
    request = urllib.request.Request(address, body_of(rows, **params), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
