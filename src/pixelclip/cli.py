"""The command line: one word a stage, and predict, settings, toy-clip, pipeline. It translates and contains no logic."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pixelclip.config import as_table, build, load, parse_overrides

Out = Annotated[Path, typer.Option(help="Folder to make. A finished one is reused, an interrupted one continued.")]
Params = Annotated[Path | None, typer.Option(help="YAML file with one section a stage.")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Settings; see `pixelclip settings`.")]

app = typer.Typer(
    name="pixelclip",
    help="Teach CLIP where things are, from images that nobody labelled.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
pipeline = typer.Typer(help="The Kubeflow pipeline: run it here, or compile it for a cluster.", no_args_is_help=True)
app.add_typer(pipeline, name="pipeline")


def _config(stage: str, params: Path | None, settings: list[str] | None) -> Any:
    overrides = parse_overrides(settings or [])
    foreign = [name for name in overrides if "." in name and not name.startswith(f"{stage}.")]
    if foreign:
        raise ValueError(f"{foreign[0]} is no setting of stage {stage}")
    return load(stage, params, overrides)


@app.command()
def toy(out: Out, params: Params = None, settings: Settings = None) -> None:
    """Paint scenes: images without labels to train on, a labelled set to evaluate on."""
    from pixelclip.toy import run

    run(out, _config("toy", params, settings))


@app.command()
def shards(
    images: Annotated[Path, typer.Option(help="Folder of images, searched recursively.")],
    out: Out,
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Pack a folder of images into tar shards."""
    from pixelclip.shards import run

    run(images, out, _config("shards", params, settings))


@app.command()
def masks(
    shards: Annotated[Path, typer.Option(help="Shards.")],
    out: Out,
    params: Params = None,
    part: Annotated[str, typer.Option(help="i/n: only the i-th of n parts of the shards, as setting masks.part.")] = "",
    preview: Annotated[int, typer.Option(help="Write OUT/preview.jpg with the masks of this many images.", min=0)] = 0,
    settings: Settings = None,
) -> None:
    """Give every image of the shards its nameless masks."""
    from pixelclip.masks import run

    run(shards, out, _config("masks", params, [*(settings or []), *([f"part={part}"] if part else [])]))
    if preview:
        from pixelclip.pictures import preview as show

        print(f"{show(out, preview, out / 'preview.jpg')} images: {out / 'preview.jpg'}")


@app.command()
def train(
    masks: Annotated[Path, typer.Option(help="Shards with masks.")], out: Out, params: Params = None, settings: Settings = None
) -> None:
    """Train a PixelCLIP from masked shards and a CLIP."""
    from pixelclip.train import run

    run(masks, out, _config("train", params, settings))


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Model folder, or models:/NAME@ALIAS.")],
    labelled: Annotated[
        list[str],
        typer.Option(help="Labelled set: FOLDER (kind=... says its layout) or KIND:FOLDER; several go into OUT/NAME."),
    ],
    out: Out,
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Measure a model and the CLIP it came from on labelled sets."""
    config = _config("evaluate", params, settings)
    from pixelclip.evaluate import run_all

    run_all(_model(model), labelled, out, config)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML: rows of settings, and the seeds at which each is run.")],
    masks: Annotated[Path, typer.Option(help="Shards with masks.")],
    labelled: Annotated[Path, typer.Option(help="Labelled set to evaluate on.")],
    out: Annotated[Path, typer.Option(help="Folder for all runs, the table and the plot; finished runs there are reused.")],
    params: Params = None,
) -> None:
    """Train and evaluate many settings at several seeds: one table, one plot."""
    from pixelclip.sweep import run

    run(file, masks, labelled, out, params)


@app.command()
def register(
    model: Annotated[str, typer.Option(help="Model folder, or models:/NAME@ALIAS.")],
    evaluation: Annotated[Path, typer.Option(help="What evaluate wrote about this model.")],
    out: Out,
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Register a model in MLflow and pass it through the gate to champion."""
    config = _config("register", params, settings)
    from pixelclip.register import run

    run(_model(model), evaluation, out, config)


@app.command()
def predict(
    photo: Annotated[Path, typer.Argument(help="Image of any size.")],
    classes: Annotated[str, typer.Option(help='"dog|puppy,grass,sky" (a bar between synonyms), or a .txt file, one a line.')],
    model: Annotated[str, typer.Option(help="Model folder, or models:/NAME@ALIAS.")],
    out: Annotated[Path, typer.Option(help="PNG of the label map; the overlay goes beside it as *.overlay.png.")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Segment a photo into classes that you name."""
    from pixelclip.images import open_image
    from pixelclip.predict import Predictor, label_image, overlay
    from pixelclip.text import names_of

    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: the label map is a .png file")
    if photo.resolve() in (out.resolve(), out.with_suffix(".overlay.png").resolve()):
        raise ValueError(f"{out}: would overwrite the photo")
    names = names_of(classes)
    image = open_image(photo)
    prediction = Predictor.load(_model(model), device)(image, names)
    out.parent.mkdir(parents=True, exist_ok=True)
    label_image(prediction.labels).save(out)
    shown = out.with_suffix(".overlay.png")
    overlay(image, prediction).save(shown)
    shares = [(float((prediction.labels == index).mean()), name) for index, name in enumerate(names)]
    print("\n".join(f"{100 * share:5.1f} %  {name}" for share, name in sorted(shares, reverse=True) if share))
    print(f"{out} (values index into the classes), {shown}")


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="A .pth that the reference implementation of PixelCLIP released.")],
    out: Out,
    clip: Annotated[str, typer.Option(help="open_clip's name of its CLIP, or a folder; else told by its shapes.")] = "",
    side: Annotated[int, typer.Option(help="Side in pixels of what the CLIP sees; 0: 320 for a ViT, 640 else.")] = 0,
) -> None:
    """Make a model folder of a checkpoint of the reference implementation."""
    from pixelclip.config import ImportConfig
    from pixelclip.convert import run

    run(checkpoint, out, build(ImportConfig, {"clip": clip, "side": side}, "import"))


@app.command()
def export(
    model: Annotated[str, typer.Option(help="Model folder, or models:/NAME@ALIAS.")],
    out: Annotated[Path, typer.Option(help="Folder for open_clip_config.json and open_clip_model.safetensors.")],
) -> None:
    """Write a model's CLIP as plain open_clip weights: open_clip.create_model("local-dir:OUT")."""
    from pixelclip.convert import export as write

    write(_model(model), out)


@app.command()
def settings() -> None:
    """Print every setting of every stage, with its default, as Markdown."""
    print(as_table())


@app.command()
def toy_clip(out: Annotated[Path, typer.Option(help="open_clip folder to make.")]) -> None:
    """Remake the shipped toy CLIP: train it on the captions of painted scenes (an hour on 2 cores)."""
    from pixelclip.toy_clip import remake

    remake(out)


@pipeline.command("run")
def pipeline_run(
    images: Annotated[Path, typer.Option(help="Folder of unlabelled images.")],
    labelled: Annotated[Path, typer.Option(help="Folder with images/, labels/ and classes.txt.")],
    out: Annotated[Path, typer.Option(help="Workspace: finished stages there are reused, interrupted ones continued.")],
    params: Params = None,
    runner: Annotated[
        str, typer.Option(help="What a step is: subprocess, or docker (a container of the image that PIXELCLIP_IMAGE names).")
    ] = "subprocess",
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Pipeline parameters, or STAGE.SETTING=VALUE.")
    ] = None,
) -> None:
    """Run the whole pipeline on this machine, without a cluster."""
    from pixelclip_pipelines.run import run_locally

    run_locally(images, labelled, out, params, parse_overrides(settings or []), runner)


@pipeline.command("compile")
def pipeline_compile(out: Annotated[Path, typer.Option(help="YAML file to write.")] = Path("pixelclip.yaml")) -> None:
    """Write the pipeline as YAML for a cluster (container image: PIXELCLIP_IMAGE)."""
    from pixelclip_pipelines.run import compile_to

    compile_to(out)
    print(out)


@pipeline.command("compile-sweep")
def pipeline_compile_sweep(
    file: Annotated[Path, typer.Argument(help="YAML: rows of settings, and the seeds at which each is run.")],
    out: Annotated[Path, typer.Option(help="YAML file to write.")] = Path("pixelclip-sweep.yaml"),
    params: Params = None,
    workspace: Annotated[
        str, typer.Option(help="Folder on a mounted volume where killed runs resume; empty: the run's artifact store.")
    ] = "",
) -> None:
    """Write a sweep as a pipeline for a cluster, all its runs side by side (container image: PIXELCLIP_IMAGE)."""
    from pixelclip_pipelines.sweep import compile_to

    compile_to(file, out, params, workspace)
    print(out)


def _model(spec: str) -> Path:
    if not spec.startswith("models:/"):
        return Path(spec)
    try:
        from pixelclip.register import fetch
    except ModuleNotFoundError as error:
        raise ValueError(f"{spec}: needs the extra `train` (pip install 'pixelclip[train]'): {error.name} is missing") from None
    return fetch(spec)


def main() -> None:
    """Runs a command; an error that its user can mend is one message and exit code 2."""
    try:
        app()
    except ValueError as error:
        print(f"pixelclip: {error}", file=sys.stderr)
        sys.exit(2)
