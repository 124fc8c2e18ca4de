"""Command line: one command per stage, and predict, doctor, ... Commands only parse and call."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pixelclip import __version__, api
from pixelclip.cli.gc import gc
from pixelclip.cli.help import Group
from pixelclip.cli.page import app as page
from pixelclip.cli.pipeline import Params, Sweep, pipeline, reject_s3
from pixelclip.cli.predict import merge, predict
from pixelclip.cli.serve import Registered, serve
from pixelclip.config import ImportConfig
from pixelclip.data.class_names import names_of
from pixelclip.settings import as_table, build, parse_overrides
from pixelclip.storage.download import local_path
from pixelclip.storage.urls import scrubbed
from pixelclip.workflow.failures import BAD_INPUT, report
from pixelclip.workflow.output import output_folder
from pixelclip.workflow.termination import terminable

_MODEL = "Model folder, s3://bucket/folder, or models:/NAME@ALIAS."

Out = Annotated[str, typer.Option(help="Output folder or s3://bucket/folder; a finished result is reused.")]
Labelled = Annotated[
    list[str], typer.Option(help="Labelled set: FOLDER (layout: setting kind) or KIND:FOLDER; several go into OUT/NAME.")
]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Settings; see `pixelclip settings`.")]

app = typer.Typer(
    name="pixelclip",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(pipeline, name="pipeline")
app.command("app")(page)
app.add_typer(serve, name="serve")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pixelclip {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Teach CLIP where things are, from images that nobody labelled."""


def _of(stage: str, settings: list[str] | None) -> dict[str, str]:
    """Return settings by their full names, `train.steps`, which differ from the names of options."""
    return {name if "." in name else f"{stage}.{name}": value for name, value in parse_overrides(settings or []).items()}


@app.command()
def toy(out: Out, params: Params = None, settings: Settings = None) -> None:
    """Paint scenes: training images without labels, and a labelled set for evaluation."""
    api.toy(out, params, **_of("toy", settings))


@app.command("fetch_data")
def fetch_data(
    repo: Annotated[str, typer.Option(help="Git repository with DVC data: folder or URL.")],
    out: Out,
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Fetch DVC-tracked data of one git revision."""
    api.fetch_data(repo, out, params, **_of("fetch_data", settings))


@app.command()
def shards(
    images: Annotated[str, typer.Option(help="Folder of images, searched recursively.")],
    out: Out,
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Pack a folder of images into tar shards."""
    api.shards(images, out, params, **_of("shards", settings))


@app.command()
def masks(
    shards: Annotated[str, typer.Option(help="Shards: a folder, a manifest, or s3://bucket/folder.")],
    out: Out,
    params: Params = None,
    part: Annotated[str, typer.Option(help="i/n: only the i-th of n parts of the shards; same as setting masks.part.")] = "",
    preview: Annotated[int, typer.Option(help="Write OUT/preview.jpg with the masks of this many images.", min=0, max=250)] = 0,
    settings: Settings = None,
) -> None:
    """Generate class-agnostic masks for every image of the shards."""
    api.masks(shards, out, params, preview, **_of("masks", [*(settings or []), *([f"part={part}"] if part else [])]))


@app.command()
def train(
    masks: Annotated[str, typer.Option(help="Shards with masks: a folder, a manifest, or s3://bucket/folder.")],
    out: Out,
    params: Params = None,
    run_name: Annotated[str, typer.Option(help="Name of the run in MLflow; same as setting train.run_name.")] = "",
    settings: Settings = None,
) -> None:
    """Train PixelCLIP on shards with masks, starting from a pretrained CLIP."""
    named = [*(settings or []), *([f"run_name={run_name}"] if run_name else [])]
    api.train(masks, out, params, **_of("train", named))


@app.command("evaluate_clip")
def evaluate_clip(
    labelled: Labelled,
    out: Out,
    clip: Annotated[str, typer.Option(help="CLIP that models are trained from; default: train.clip of --params.")] = "",
    side: Annotated[int, typer.Option(help="Side of CLIP's input in pixels; default: train.side of --params.", min=0)] = 0,
    residual: Annotated[str, typer.Option(help="cls or patch; default: train.residual of --params.")] = "",
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Evaluate plain CLIP on labelled sets, once for all models trained from it (settings of evaluate)."""
    api.evaluate_clip(labelled, out, clip, side, residual, params, **_of("evaluate", settings))


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help=_MODEL)],
    labelled: Labelled,
    out: Out,
    clip_evaluation: Annotated[str, typer.Option(help="Output of evaluate_clip; CLIP is then not evaluated again.")] = "",
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Evaluate a model and the CLIP it was trained from on labelled sets."""
    api.evaluate(model, labelled, out, clip_evaluation, params, **_of("evaluate", settings))


@app.command()
def sweep(
    file: Sweep,
    masks: Annotated[str, typer.Option(help="Shards with masks.")],
    labelled: Annotated[str, typer.Option(help="Labelled set to evaluate on.")],
    out: Annotated[Path, typer.Option(callback=reject_s3, help="Folder for runs, table and plot; finished runs are reused.")],
    params: Params = None,
) -> None:
    """Train and evaluate rows of settings with several seeds, or search ranges; write a table and a plot."""
    from pixelclip.commands.sweep import run

    run(file, masks, labelled, out, params)


@app.command()
def register(
    model: Annotated[str, typer.Option(help=_MODEL)],
    out: Out,
    evaluation: Annotated[str, typer.Option(help="Output of evaluate for this model; default: it is unmeasured.")] = "",
    params: Params = None,
    settings: Settings = None,
) -> None:
    """Register a model in MLflow and promote it to champion if it passes the gate."""
    api.register(model, out, evaluation, params, **_of("register", settings))


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="Name of the registered model.")],
    version: Annotated[int | None, typer.Argument(help="Version to promote.")] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Restore the previous champion.")] = False,
    force: Annotated[str, typer.Option(metavar="REASON", help="Promote against the gate; the reason is recorded.")] = "",
) -> None:
    """Promote a registered version to champion if it beats the current one (else exit code 1)."""
    from pixelclip.registry.promotion import rollback as roll_back
    from pixelclip.registry.promotion import run

    if rollback == (version is not None):
        raise ValueError("promote: give either VERSION or --rollback")
    if version is None:
        roll_back(name)
    elif not run(name, version, force).champion:
        raise typer.Exit(1)


@app.command()
def lineage(
    model: Registered,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the origin of a registered model: run, settings, data, code, image."""
    from pixelclip.registry.lineage import run

    run(model, as_json)


@app.command()
def reproduce(
    model: Registered,
    out: Annotated[Path, typer.Option(callback=reject_s3, help="Output folder; finished parts are reused.")],
    train: Annotated[bool, typer.Option("--train", help="Also repeat training, and evaluate the new model.")] = False,
    tolerance: Annotated[float, typer.Option(help="Maximum difference of equal metrics, in points.", min=0)] = 0.01,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Runtime settings, e.g. evaluate.device=cpu.")
    ] = None,
) -> None:
    """Restore the data and settings of a registered model and evaluate it again (exit code 1 if metrics differ)."""
    from pixelclip.commands.reproduce import run

    if not run(model, out, train=train, tolerance=tolerance, runtime=parse_overrides(settings or [])):
        raise typer.Exit(1)


app.command()(predict)
app.command()(merge)
app.command()(gc)


@app.command("import")
def import_(
    checkpoint: Annotated[str, typer.Argument(help=".pth file released with the reference implementation of PixelCLIP.")],
    out: Out,
    clip: Annotated[str, typer.Option(help="open_clip's name of its CLIP, or a folder; default: detected by its shapes.")] = "",
    side: Annotated[int, typer.Option(help="Side of CLIP's input in pixels; 0: about 320 (ViT), 640 (ConvNeXt).")] = 0,
) -> None:
    """Convert a checkpoint of the reference implementation to a model folder."""
    from pixelclip.models.convert import run

    with output_folder(out) as folder:
        run(api.model_path(checkpoint), folder, build(ImportConfig, {"clip": clip, "side": side}, "import"))


@app.command()
def export(
    model: Annotated[str, typer.Option(help=_MODEL)],
    out: Annotated[Path, typer.Option(callback=reject_s3, help="Folder to write.")],
    kind: Annotated[
        str, typer.Option("--format", help="open_clip; huggingface: the same with a model card; onnx: the image tower.")
    ] = "open_clip",
    classes: Annotated[
        str,
        typer.Option(help="For onnx: class names as in predict. Its output is then their scores, otherwise dense features."),
    ] = "",
    evaluation: Annotated[
        str, typer.Option(help="For huggingface: output of evaluate for this model; the model card shows its scores.")
    ] = "",
    licence: Annotated[
        str, typer.Option(help="For huggingface: licence of the weights; a registered model has that of its registration.")
    ] = "",
    data_licence: Annotated[str, typer.Option(help="For huggingface: licence of the training images, likewise.")] = "",
) -> None:
    """Export a model for open_clip, the Hugging Face hub, or onnxruntime."""
    from pixelclip.commands.export import run

    measured = local_path(evaluation) if evaluation else None
    uri = model if model.startswith("models:/") else ""
    path, licences = api.model_path(model), {"licence": licence, "data_licence": data_licence}
    stated = {key: text for key, text in licences.items() if text}
    if uri and kind == "huggingface":
        from pixelclip.registry.model_version import licences_of

        stated = licences_of(uri) | stated
    files = run(path, out, kind, names_of(classes) if classes else (), measured, uri, stated)
    print("\n".join(f"{file} ({file.stat().st_size / 1e6:,.1f} MB)" for file in files))


@app.command()
def settings() -> None:
    """Print every setting of every stage with its default, as Markdown."""
    print(as_table())


@app.command()
def doctor(
    s3: Annotated[str, typer.Option(help="s3://bucket or s3://bucket/prefix that runs read.")] = "",
    data: Annotated[str, typer.Option(help="Git repository with DVC data: folder or URL; default: the current folder.")] = "",
    kfp: Annotated[str, typer.Option(help="URL of Kubeflow Pipelines; default: KFP_ENDPOINT.")] = "",
    image: Annotated[str, typer.Option(help="Container image for the cluster; default: PIXELCLIP_IMAGE.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check everything that a run needs and suggest fixes; exit code 1 if something configured fails."""
    from pixelclip.commands.doctor import as_json, as_text, run

    findings = run(s3, data, kfp, image)
    print(as_json(findings) if json else as_text(findings))
    raise typer.Exit(any(finding.state == "failed" for finding in findings))


@app.command()
def toy_clip(out: Annotated[Path, typer.Option(callback=reject_s3, help="Output folder, in open_clip's format.")]) -> None:
    """Train the shipped toy CLIP again, on painted scenes and their captions (an hour on 2 cores)."""
    from pixelclip.toy_scenes.toy_clip import remake

    remake(out)


def main() -> None:
    """Run a command; report input and disk errors in one message with exit code 2."""
    # Waiting threads sleep instead of spinning, which uses up a CPU quota. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with terminable():
            app()
        return
    except (ValueError, OSError) as error:
        problem, message = error, scrubbed(str(error))
    if isinstance(problem, OSError):  # usually of the disk: missing folder, no permission, no space left
        message = f"{problem.filename}: {problem.strerror}" if problem.filename else " ".join(message.split())
    print(f"pixelclip: {message}", file=sys.stderr)
    report(problem, message)
    sys.exit(BAD_INPUT)
