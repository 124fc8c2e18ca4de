"""Compile the pipeline for the settings of a cluster."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pixelclip_pipelines.run import compile_to


def compiled(folder: Path, settings: str, **options: Any) -> tuple[dict, dict, Path]:
    """Compile the pipeline; return it, its platform part and the file."""
    (folder / "cluster.yaml").write_text(settings)
    path = folder / "pipeline.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PIXELCLIP_IMAGE", raising=False)
        compile_to(path, folder / "cluster.yaml", **options)
    return *yaml.safe_load_all(path.read_text()), path
