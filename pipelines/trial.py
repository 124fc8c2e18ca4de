"""One trial of a search on a cluster: `python3 -m pixelclip_pipelines.trial --masks M --labelled L --out DIR NAME=VALUE ...`.

It trains and evaluates with every seed, and ends with the line `gain=NUMBER`, which Katib reads. A repeated trial continues.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pixelclip import evaluate
from pixelclip.commands.sweep_file import OBJECTIVE, tagged
from pixelclip.commands.sweep_results import values_of
from pixelclip.settings import load, parse_overrides
from pixelclip.storage.download import local_path
from pixelclip_pipelines.steps import processes, train_by


def run(masks: str, labelled: str, out: Path, sweep: str, seeds: Sequence[int], settings: Mapping[str, Any]) -> float:
    """Train and evaluate with every seed, and return the mean gain.

    Args:
        masks: shards with masks, a folder or an `s3://` prefix.
        labelled: labelled set, a folder or an `s3://` prefix.
        out: folder of the trial on the shared volume, named like the trial.
        sweep: name of the sweep, for MLflow.
        seeds: seeds of the training.
        settings: settings as `stage.setting: value`.

    Raises:
        ValueError: an invalid setting or input.
        SystemExit: see `steps.train_by`.
    """
    truth = local_path(labelled)
    results = []
    for seed in seeds:
        config = tagged(load("train", overrides={**settings, "train.seed": seed}), sweep, out.name)
        folder = out / f"seed-{seed}"
        train_by(processes(config.device), masks, folder / "model", config)
        metrics = evaluate.run(folder / "model", truth, folder / "evaluation", load("evaluate", overrides=settings))
        results.append({"metrics": metrics})
    return fmean(values_of(results, OBJECTIVE))


def main() -> None:
    """Run the trial of the command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("masks", "labelled", "out", "sweep", "seeds"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    try:
        gain = run(given.masks, given.labelled, Path(given.out), given.sweep, seeds, parse_overrides(given.settings))
    except ValueError as error:
        raise SystemExit(f"trial: {error}") from None
    print(f"{OBJECTIVE}={gain:.6f}", flush=True)


if __name__ == "__main__":
    main()
