"""Limits of a request: for the served model and for the page."""

import os
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pixelclip.settings import build

_ENVIRONMENT = "PIXELCLIP_SERVE_"


class Limits(BaseModel):
    """Limits of a request, set by `model_config` or variables such as PIXELCLIP_SERVE_MAX_BYTES."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    max_images: int = Field(default=16, ge=1, description="Rows per request.")
    max_bytes: int = Field(default=20_000_000, ge=1, description="Bytes of an image file.")
    max_pixels: int = Field(default=16_000_000, ge=1, description="Pixels of an image; larger ones are not decoded.")
    max_parallel: int = Field(default=2, ge=1, description="Images segmented at the same time; the others wait.")
    max_classes: int = Field(default=1000, ge=1, description="Classes per image, without synonyms.")
    max_names: int = Field(default=1000, ge=1, description="Class names per image, with synonyms.")
    max_characters: int = Field(default=200, ge=1, description="Characters per name.")

    @classmethod
    def load(cls, settings: dict[str, Any]) -> "Limits":
        """Combine a model's settings with the environment, which has precedence; raise ValueError for invalid limits."""
        variables = {name: f"{_ENVIRONMENT}{name.upper()}" for name in cls.model_fields}
        environment = {name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)}
        return build(cls, settings | environment, f"limits of the served model ({_ENVIRONMENT}*)")


def check_classes(classes: str, limits: Limits) -> None:
    """Raise ValueError if a line of class names exceeds a limit."""
    # Each name is encoded in eight templates; the tokenizer's time is quadratic in the length of a name.
    names = re.split("[,|]", classes)
    for limit, found, text in (
        (limits.max_classes, classes.count(",") + 1, "{} names"),
        (limits.max_names, len(names), "{} names with synonyms"),
        (limits.max_characters, max(map(len, names)), "a name of {} characters"),
    ):
        if found > limit:
            raise ValueError(f"classes: {text.format(found)}; at most {limit} are allowed")
