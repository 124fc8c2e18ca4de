"""Finished evaluations to register."""

from collections.abc import Mapping
from pathlib import Path

from pixelclip.config import EvaluateConfig
from pixelclip.evaluation.protocol import protocol_of
from pixelclip.storage.files import digest, read_json, write_json
from pixelclip.workflow.stage import describe


def evaluation(folder: Path, model: Path, miou: float, gain: float, **settings: object) -> Path:
    """Write the output of `evaluate`."""
    return evaluation_of(folder, model, {"miou/set": miou, "gain/set": gain}, **settings)


def evaluation_of(
    folder: Path, model: Path, metrics: Mapping[str, float], labelled: str = "l1", masks_md5: str = "", **settings: object
) -> Path:
    folder.mkdir()
    write_json(folder / "metrics.json", dict(metrics))
    inputs = {"model": describe(model), "labelled": {"path": "/there/set", "md5": labelled, "num_files": 1, "size": 1}}
    if masks_md5:
        inputs["masks"] = inputs["labelled"] | {"path": settings["masks_folder"], "md5": masks_md5}
    config = EvaluateConfig(**settings)
    side = config.side or read_json(model / "config.json")["side"]
    write_json(folder / "protocol.json", protocol_of(config.model_copy(update={"name": config.name or "set", "side": side})))
    chosen = config.model_dump(exclude={"batch_size", "pictures", "device"})
    write_json(
        folder / "provenance.json",
        {
            "stage": "evaluate",
            "fingerprint": "f3",
            "settings": chosen,
            "inputs": inputs,
            "version": "0.1.0",
            "revision": "abc",
            "output": digest(folder, [folder / "metrics.json"]),
        },
    )
    return folder
