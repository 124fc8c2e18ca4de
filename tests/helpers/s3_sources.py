"""Shards in an S3 bucket."""

from pathlib import Path
from typing import Any

import numpy as np

from helpers.fake_data import annotation, encoded, pixels, write_tar

QUARTERS = np.kron(np.eye(4).reshape(4, 2, 2), np.ones((20, 24))).astype(bool)


def sources(folder: Path, tars: int = 3) -> Path:
    """Write shards of two images with masks each."""
    for tar in range(tars):
        members = {}
        for number in range(2):
            members[f"{tar}-{number}.jpg"] = encoded(pixels(40, 48, 2 * tar + number))
            members[f"{tar}-{number}.json"] = annotation(QUARTERS)
        write_tar(folder / f"{tar}.tar", members)
    return folder


def put(bucket: Any, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.put_object(Bucket="data", Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())
