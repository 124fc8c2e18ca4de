"""The page itself, built with Gradio."""

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # the page works without a network, and tells nobody about its use

import gradio as gr
from PIL import Image

from pixelclip.app.comparison import ALL_CLASSES, Comparison, compare, legend, pictures
from pixelclip.config import Quality
from pixelclip.data.class_names import parse_names
from pixelclip.data.images import FORMATS, decode_image, to_rgb, turn_upright
from pixelclip.inference.limits import Limits, check_classes
from pixelclip.inference.loading import Model
from pixelclip.inference.prediction import palette_image

MAX_VISITORS = 64
"""Maximum length of the queue, and maximum number of visitors whose results stay in memory."""
_KEPT_SECONDS = 3600  # files and results of a visitor


class _Answers:
    """What happens when a visitor presses a button."""

    def __init__(self, models: Mapping[str, Model], limits: Limits) -> None:
        self.models, self.limits = models, limits
        self.folder = tempfile.TemporaryDirectory(prefix="pixelclip_app_")
        self.files: deque[Path] = deque()

    def segment(self, path: str | None, text: str, left: str, right: str, quality: Quality, opacity: float) -> tuple[Any, ...]:
        """Segment a photo with both models: state, pictures, legend, choices of what is shown, label map to download."""
        if not path:
            raise _error("choose a photo first")
        try:
            check_classes(text, self.limits)
            photo = _open(Path(path), self.limits)
            comparison, prediction = compare(photo, parse_names(text), self.models[left], self.models[right], quality)
        except ValueError as error:
            raise _error(str(error)) from None
        label_map = Path(tempfile.mkdtemp(dir=self.folder.name), "label_map.png")
        palette_image(prediction.labels, len(prediction.classes)).save(label_map)
        self.files.append(label_map)
        if len(self.files) > MAX_VISITORS:  # Gradio has copied the oldest long since
            shutil.rmtree(self.files.popleft().parent)
        shown = gr.Dropdown(choices=[ALL_CLASSES, *comparison.classes], value=ALL_CLASSES, interactive=True)
        drawn, found = pictures(comparison, ALL_CLASSES, opacity), legend(comparison, left, right)
        return comparison, drawn, found, shown, str(label_map)

    def draw(self, comparison: Comparison | None, shown: str, opacity: float) -> Any:
        """Draw the pictures of the last result again."""
        return pictures(comparison, shown, opacity) if comparison else None


def build(
    models: Mapping[str, Model], classes: str, examples: Sequence[tuple[str, str]], note: str, limits: Limits
) -> gr.Blocks:
    """Build the page.

    Args:
        models: models by the names that visitors see; the first is shown on the left at first, the second on the right.
        classes: class names in the text field at first.
        examples: paths of photos, each with its class names.
        note: Markdown under the title.
        limits: of a photo and its class names, as in serving.
    """
    Image.init()
    Image.ID[:] = [name for name in Image.ID if name in FORMATS]  # Gradio opens uploads itself; to open an ICO decodes it
    names, answers = list(models), _Answers(models, limits)
    with gr.Blocks(title="pixelclip", delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS)) as page:
        gr.Markdown(f"# pixelclip\n\n{note}")
        state = gr.State(time_to_live=_KEPT_SECONDS)
        with gr.Row():
            with gr.Column(min_width=300):
                # Image mode None passes the file on as it is: `_open` checks its size before decoding it.
                photo = gr.Image(
                    label="Photo",
                    sources=["upload", "clipboard"],
                    type="filepath",
                    image_mode=None,
                    height=300,
                    elem_id="photo",
                )
                text = gr.Textbox(classes, label="Classes, separated by commas; a bar between synonyms", elem_id="classes")
                with gr.Row():
                    left = gr.Dropdown(names, value=names[0], label="Left", min_width=240)
                    right = gr.Dropdown(names, value=names[min(1, len(names) - 1)], label="Right", min_width=240)
                quality = gr.Radio(list(get_args(Quality)), value="fast", label="Quality")
                button = gr.Button("Segment", variant="primary")
            with gr.Column(scale=2, min_width=300):
                slider = gr.ImageSlider(label="Left | right", max_height=640, interactive=False, elem_id="result")
                with gr.Row():
                    shown = gr.Dropdown([ALL_CLASSES], value=ALL_CLASSES, label="Show", min_width=120, elem_id="shown")
                    opacity = gr.Slider(0, 1, 0.55, step=0.05, label="Opacity", min_width=120)
                shares = gr.HTML(elem_id="legend")
                download = gr.DownloadButton("Label map of the right model (PNG of class indices)", elem_id="download")
        events = [button.click, text.submit]
        if examples:
            table = gr.Examples([list(example) for example in examples], [photo, text], label="Examples", cache_examples=False)
            events.append(table.load_input_event.then)
        inputs, outputs = [photo, text, left, right, quality, opacity], [state, slider, shares, shown, download]
        for event in events:
            event(
                answers.segment,
                inputs,
                outputs,
                concurrency_limit=limits.max_parallel,
                concurrency_id="segment",
                api_name=False,
            )
        for change in (shown.input, opacity.release):
            change(answers.draw, [state, shown, opacity], slider, show_progress="hidden", api_name=False)
    return page.queue(max_size=MAX_VISITORS)


def _error(message: str) -> gr.Error:
    return gr.Error(message, duration=None, print_exception=False)


def _open(path: Path, limits: Limits) -> Image.Image:
    if path.stat().st_size > limits.max_bytes:
        raise ValueError(f"{path.name}: {path.stat().st_size} bytes; at most {limits.max_bytes} are allowed")
    try:
        return to_rgb(turn_upright(decode_image(path.read_bytes(), limits.max_pixels)))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
