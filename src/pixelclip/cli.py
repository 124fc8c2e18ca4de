"""The command line: one word a stage, and predict, settings, toy-clip, pipeline. It translates and contains no logic."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from pixelclip import cli_cluster
from pixelclip.cli_cluster import Cluster, Image, Nodes, Overrides, Params, Repo, Revision
from pixelclip.config import as_table, build, device_name, load, parse_overrides
from pixelclip.s3 import is_s3

_MODEL = "Model folder, s3://bucket/folder, or models:/NAME@ALIAS."


def _here(path: Path) -> Path:
    """Refuses s3:// where only a folder or file of this machine will do: it would become a folder called `s3:`."""
    if path.parts[:1] and path.parts[0].lower() == "s3:":
        raise ValueError(f"s3://{Path(*path.parts[1:])}: must be a path on this machine")
    return path


Out = Annotated[str, typer.Option(help="Folder or s3://bucket/folder to make; a finished one is reused.")]
Labelled = Annotated[
    list[str], typer.Option(help="Labelled set: FOLDER (kind=... says its layout) or KIND:FOLDER; several go into OUT/NAME.")
]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Settings; see `pixelclip settings`.")]

app = typer.Typer(
    name="pixelclip",
    help="Teach CLIP where things are, from images that nobody labelled.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
pipeline = typer.Typer(help="The Kubeflow pipeline: run it here, or on a cluster.", no_args_is_help=True)
app.add_typer(pipeline, name="pipeline")
pipeline.command()(cli_cluster.submit)
pipeline.command()(cli_cluster.status)
pipeline.add_typer(cli_cluster.schedule, name="schedule")


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

    with _made(out) as folder:
        run(folder, _config("toy", params, settings))


@app.command("fetch_data")
def fetch_data(
    repo: Annotated[str, typer.Option(help="Git repository with DVC data: folder or URL.")],
    out: Out,
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Fetch data that DVC tracks, as they were in one git revision."""
    from pixelclip.fetch_data import run

    with _made(out) as folder:
        run(repo, folder, _config("fetch_data", params, settings))


@app.command()
def shards(
    images: Annotated[str, typer.Option(help="Folder of images, searched recursively.")],
    out: Out,
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Pack a folder of images into tar shards."""
    from pixelclip.shards import run

    config = _config("shards", params, settings)
    with _made(out) as folder:
        run(images, folder, config)


@app.command()
def masks(
    shards: Annotated[str, typer.Option(help="Shards: a folder, a manifest, or s3://bucket/folder.")],
    out: Out,
    params: Params = None,
    part: Annotated[str, typer.Option(help="i/n: only the i-th of n parts of the shards, as setting masks.part.")] = "",
    preview: Annotated[int, typer.Option(help="Write OUT/preview.jpg with the masks of this many images.", min=0, max=250)] = 0,
    settings: Settings = None,
) -> None:
    """Give every image of the shards its nameless masks."""
    from pixelclip.masks import run

    config = _config("masks", params, [*(settings or []), *([f"part={part}"] if part else [])])
    with _made(out) as folder:
        run(shards, folder, config)
    if preview:
        from pixelclip.pictures import preview as show

        with _made_file(f"{out.rstrip('/')}/preview.jpg") as picture:
            shown = show(out, preview, picture)
        print(f"{shown} images: {out.rstrip('/')}/preview.jpg")


@app.command()
def train(
    masks: Annotated[str, typer.Option(help="Shards with masks: a folder, a manifest, or s3://bucket/folder.")],
    out: Out,
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Train a PixelCLIP from masked shards and a CLIP."""
    from pixelclip.train import run

    config = _config("train", params, settings)
    with _made(out) as folder:
        run(masks, folder, config)


@app.command("evaluate_clip")
def evaluate_clip(
    labelled: Labelled,
    out: Out,
    clip: Annotated[str, typer.Option(help="The CLIP that models are trained from; else train.clip of --params.")] = "",
    side: Annotated[int, typer.Option(help="Side in pixels of what they see; else train.side of --params.", min=0)] = 0,
    residual: Annotated[str, typer.Option(help="cls or patch; else train.residual of --params.")] = "",
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Measure plain CLIP on labelled sets, once for all models that are trained from it (settings of evaluate)."""
    config = _config("evaluate", params, settings)
    given = {"clip": clip, "side": side, "residual": residual}
    trained = load("train", params, {name: value for name, value in given.items() if value})
    from pixelclip.evaluate_clip import run_all

    with _made(out) as folder:
        run_all(trained.clip, labelled, folder, config, trained.side, trained.residual)


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help=_MODEL)],
    labelled: Labelled,
    out: Out,
    clip_evaluation: Annotated[str, typer.Option(help="What evaluate_clip made: CLIP is not measured again.")] = "",
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Measure a model and the CLIP it came from on labelled sets."""
    config = _config("evaluate", params, settings)
    from pixelclip.evaluate import run_all

    with _made(out) as folder:
        run_all(_path(model), labelled, folder, config, _path(clip_evaluation) if clip_evaluation else None)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML: rows of settings, and the seeds at which each is run.")],
    masks: Annotated[str, typer.Option(help="Shards with masks.")],
    labelled: Annotated[str, typer.Option(help="Labelled set to evaluate on.")],
    out: Annotated[
        Path, typer.Option(callback=_here, help="Folder for all runs, the table and the plot; finished runs there are reused.")
    ],
    params: Params = None,
) -> None:
    """Train and evaluate many settings at several seeds: one table, one plot."""
    from pixelclip.sweep import run

    run(file, masks, labelled, out, params)


@app.command()
def register(
    model: Annotated[str, typer.Option(help=_MODEL)],
    evaluation: Annotated[str, typer.Option(help="What evaluate wrote about this model.")],
    out: Out,
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Register a model in MLflow and pass it through the gate to champion."""
    config = _config("register", params, settings)
    from pixelclip.register import run

    with _made(out) as folder:
        run(_path(model), _path(evaluation), folder, config)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    version: Annotated[int | None, typer.Argument(help="The version that shall be champion.")] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Make the champion before this one champion again.")] = False,
    force: Annotated[str, typer.Option(metavar="REASON", help="Promote against the gate; the reason is recorded.")] = "",
) -> None:
    """Make a registered version the champion, if it beats the present one (else exit code 1)."""
    from pixelclip.promote import rollback as roll_back
    from pixelclip.promote import run

    if rollback == (version is not None):
        raise ValueError("promote: either a VERSION or --rollback is needed")
    if version is None:
        roll_back(name)
    elif not run(name, version, force).champion:
        raise typer.Exit(1)


@app.command()
def lineage(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where a registered model comes from: run, settings, data, code, image."""
    from pixelclip.lineage import run

    run(model, as_json)


@app.command()
def reproduce(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    out: Annotated[Path, typer.Option(callback=_here, help="Folder for what is restored and made; finished parts are reused.")],
    train: Annotated[bool, typer.Option("--train", help="Train anew, too, and evaluate what comes out.")] = False,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of a figure that counts as equal, in points.", min=0)
    ] = 0.01,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Runtime settings, as evaluate.device=cpu.")
    ] = None,
) -> None:
    """Restore a registered model's data and settings and measure it again (exit code 1 when the numbers differ)."""
    from pixelclip.reproduce import run

    if not run(model, out, train=train, tolerance=tolerance, runtime=parse_overrides(settings or [])):
        raise typer.Exit(1)


@app.command()
def predict(
    photo: Annotated[Path, typer.Argument(callback=_here, help="Image of any size.")],
    classes: Annotated[str, typer.Option(help='"dog|puppy,grass,sky" (a bar between synonyms), or a .txt file, one a line.')],
    model: Annotated[str, typer.Option(help=_MODEL)],
    out: Annotated[
        Path, typer.Option(callback=_here, help="PNG of the label map; the overlay goes beside it as *.overlay.png.")
    ],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Segment a photo into classes that you name."""
    from pixelclip.images import open_image
    from pixelclip.predict import Predictor, label_image, overlay
    from pixelclip.storage import check_place
    from pixelclip.text import names_of

    device_name(device)
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: the label map is a .png file")
    if photo.resolve() in (out.resolve(), out.with_suffix(".overlay.png").resolve()):
        raise ValueError(f"{out}: would overwrite the photo")
    names = names_of(classes)
    image = open_image(photo)
    check_place(out)
    prediction = Predictor.load(_path(model), device)(image, names)
    label_image(prediction.labels).save(out)
    shown = out.with_suffix(".overlay.png")
    overlay(image, prediction).save(shown)
    shares = [(float((prediction.labels == index).mean()), name) for index, name in enumerate(names)]
    print("\n".join(f"{100 * share:5.1f} %  {name}" for share, name in sorted(shares, reverse=True) if share))
    print(f"{out} (values index into the classes), {shown}")


@app.command("import")
def import_(
    checkpoint: Annotated[str, typer.Argument(help="A .pth that the reference implementation of PixelCLIP released.")],
    out: Out,
    clip: Annotated[str, typer.Option(help="open_clip's name of its CLIP, or a folder; else told by its shapes.")] = "",
    side: Annotated[int, typer.Option(help="Side in pixels of what the CLIP sees; 0: about 320 for a ViT, 640 else.")] = 0,
) -> None:
    """Make a model folder of a checkpoint of the reference implementation."""
    from pixelclip.config import ImportConfig
    from pixelclip.convert import run

    with _made(out) as folder:
        run(_path(checkpoint), folder, build(ImportConfig, {"clip": clip, "side": side}, "import"))


@app.command()
def export(
    model: Annotated[str, typer.Option(help=_MODEL)],
    out: Annotated[
        Path, typer.Option(callback=_here, help="Folder for open_clip_config.json and open_clip_model.safetensors.")
    ],
) -> None:
    """Write a model's CLIP as plain open_clip weights: open_clip.create_model("local-dir:OUT")."""
    from pixelclip.convert import export as write

    write(_path(model), out)


@app.command()
def settings() -> None:
    """Print every setting of every stage, with its default, as Markdown."""
    print(as_table())


@app.command()
def doctor(
    s3: Annotated[str, typer.Option(help="s3://bucket or s3://bucket/prefix that runs read.")] = "",
    data: Annotated[str, typer.Option(help="Git repository with DVC data: folder or URL; else the present folder.")] = "",
    kfp: Annotated[str, typer.Option(help="URL of Kubeflow Pipelines; else KFP_ENDPOINT.")] = "",
    image: Annotated[str, typer.Option(help="Container image that a cluster shall pull; else PIXELCLIP_IMAGE.")] = "",
    json: Annotated[bool, typer.Option("--json", help="The same for programs.")] = False,
) -> None:
    """Check everything that a run needs, and say what to do; exit code 1 if something that is configured fails."""
    from pixelclip.doctor import as_json, as_text, run

    findings = run(s3, data, kfp, image)
    print(as_json(findings) if json else as_text(findings))
    raise typer.Exit(any(finding.state == "failed" for finding in findings))


@app.command()
def toy_clip(out: Annotated[Path, typer.Option(callback=_here, help="open_clip folder to make.")]) -> None:
    """Remake the shipped toy CLIP: train it on the captions of painted scenes (an hour on 2 cores)."""
    from pixelclip.toy_clip import remake

    remake(out)


@pipeline.command("run")
def pipeline_run(
    images: Annotated[str, typer.Option(help="Unlabelled images: folder, s3://, or path in --repo.")],
    labelled: Annotated[str, typer.Option(help="Labelled set, found as --images: images/, labels/, classes.txt.")],
    out: Annotated[
        Path, typer.Option(callback=_here, help="Workspace: finished stages there are reused, interrupted ones continued.")
    ],
    repo: Repo = "",
    revision: Revision = "",
    params: Params = None,
    runner: Annotated[
        str, typer.Option(help="What a step is: subprocess, or docker (a container of the image that PIXELCLIP_IMAGE names).")
    ] = "subprocess",
    settings: Overrides = None,
) -> None:
    """Run the whole pipeline on this machine, without a cluster."""
    from pixelclip_pipelines.run import run_locally

    run_locally(images, labelled, out, params, parse_overrides(settings or []), repo, revision, runner)


@pipeline.command("compile")
def pipeline_compile(
    out: Annotated[Path, typer.Option(callback=_here, help="YAML file to write.")] = Path("pixelclip.yaml"),
    cluster: Cluster = None,
    nodes: Nodes = 1,
    image: Image = "",
) -> None:
    """Write the pipeline as YAML for a cluster."""
    from pixelclip_pipelines.run import compile_to

    compile_to(out, cluster, nodes, image)
    print(out)


@pipeline.command("compile-sweep")
def pipeline_compile_sweep(
    file: Annotated[Path, typer.Argument(help="YAML: rows of settings, and the seeds at which each is run.")],
    out: Annotated[Path, typer.Option(callback=_here, help="YAML file to write.")] = Path("pixelclip-sweep.yaml"),
    params: Params = None,
    workspace: Annotated[
        str, typer.Option(help="Folder on a mounted volume where killed runs resume; empty: the run's artifact store.")
    ] = "",
    cluster: Cluster = None,
    image: Image = "",
) -> None:
    """Write a sweep as a pipeline for a cluster, all its runs side by side."""
    from pixelclip_pipelines.sweep import compile_to

    compile_to(file, out, params, workspace, cluster, image)
    print(out)


def _made(out: str) -> AbstractContextManager[Path]:
    if not is_s3(out):
        return nullcontext(Path(out))
    from pixelclip.output import outbox

    return outbox(out)


@contextmanager
def _made_file(out: str) -> Iterator[Path]:
    if not is_s3(out):
        yield Path(out)
        return
    from pixelclip.upload import upload

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, out.rpartition("/")[2])
        yield file
        upload(file, out)


def _path(spec: str) -> Path:
    """What a path, a URI or a registered model names, on this machine."""
    if not spec.startswith("models:/"):
        from pixelclip.download import here

        return here(spec)
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
    except OSError as error:  # of the disk, most of all: no such folder, no permission, no space left
        said = f"{error.filename}: {error.strerror}" if error.filename else " ".join(str(error).split())
        print(f"pixelclip: {said}", file=sys.stderr)
        sys.exit(2)
