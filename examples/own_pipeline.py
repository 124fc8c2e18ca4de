"""A pipeline of your own with components of pixelclip: generate class-agnostic masks for photos, and check how many there are.

    python examples/own_pipeline.py --photos photos            # run on this machine
    python examples/own_pipeline.py --compile runs/own.yaml    # compile for Kubeflow Pipelines

The image of all steps is PIXELCLIP_IMAGE. On a cluster photos are an s3:// prefix or a folder that the pods mount.
"""

import argparse
import tempfile
from pathlib import Path

from kfp import compiler, dsl, local

from pixelclip_components import IMAGE
from pixelclip_components.fetch_data.component import fetch_data
from pixelclip_components.masks.component import masks
from pixelclip_components.shards.component import shards


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def check_masks(masked: dsl.Input[dsl.Dataset], fewest: int) -> float:
    """Return the number of masks per photo; fail if a photo has fewer than `fewest`."""
    import json
    import tarfile
    from pathlib import Path

    counts = {}
    for path in sorted(Path(masked.path).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):  # SA-1B's format
                    counts[member.name] = len(json.load(tar.extractfile(member))["annotations"])
    if bad := [name for name, count in counts.items() if count < fewest]:
        raise ValueError(f"{len(bad)} of {len(counts)} photos have fewer than {fewest} masks, for example {bad[0]}")
    return sum(counts.values()) / len(counts)


@dsl.pipeline(name="own-pipeline", description="Class-agnostic masks for photos, checked by a step of its own.")
def own_pipeline(photos: str, scale: int = 300, fewest: int = 1) -> float:
    """Fetch photos, pack them, generate masks and check them.

    Args:
        photos: Folder or s3:// prefix of photos.
        scale: Felzenszwalb's scale: the larger, the fewer masks.
        fewest: Fewest masks that a photo may have.
    """
    fetched = fetch_data(repo="", path=photos, revision="", settings={})
    packed = shards(images=fetched.outputs["data"], settings={})
    chosen = {"masks.felzenszwalb_scale": scale}
    masked = masks(shards=packed.outputs["shards"], generator="felzenszwalb", settings=chosen)
    return check_masks(masked=masked.outputs["masks"], fewest=fewest).output


def main() -> None:
    """Run or compile the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="folder of photos; run the pipeline on this machine")
    parser.add_argument("--compile", type=Path, help="YAML file to write")
    options = parser.parse_args()
    if options.compile:
        options.compile.parent.mkdir(parents=True, exist_ok=True)
        compiler.Compiler().compile(own_pipeline, str(options.compile))
    if options.photos:
        with tempfile.TemporaryDirectory() as folder:
            local.init(local.SubprocessRunner(use_venv=False), pipeline_root=folder, raise_on_error=True)
            print(f"{own_pipeline(photos=str(options.photos.absolute())).output:.1f} masks per photo")
    if not (options.compile or options.photos):
        parser.error("give --photos, --compile or both")


if __name__ == "__main__":
    main()
