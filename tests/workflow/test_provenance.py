"""What is read from a chain of provenances."""

from pixelclip.workflow.provenance import tags, used_settings


def written(stage, md5, settings=None, **inputs):
    document = {"stage": stage, "settings": settings or {}, "inputs": inputs, "revision": "r", "version": "1"}
    return {"path": f"/{md5}", "md5": md5, "provenance": document}


def second_round():
    """A model trained on masks that a model of the first round made."""
    shards = written("shards", "shards")
    first = written("masks", "first masks", {"generator": "felzenszwalb", "felzenszwalb_scale": 3.0}, shards=shards)
    model = written("train", "first model", {"steps": 1}, masks=first)
    second = written("masks", "second masks", {"generator": "model", "model_min_area": 7}, shards=shards, weights=model)
    return written("train", "second model", {"steps": 2}, masks=second)["provenance"]


def test_nearer_of_two_inputs_of_one_name_is_tagged():
    found = tags(second_round())
    assert found["data.masks.md5"] == "second masks"
    assert found["data.masks.path"] == "/second masks"
    assert found["data.weights.md5"] == "first model"


def test_settings_of_other_generators_are_unused():
    assert used_settings(second_round()) == {"train.steps": 2, "masks.generator": "model", "masks.model_min_area": 7}
    first = second_round()["inputs"]["masks"]["provenance"]["inputs"]["weights"]["provenance"]
    assert "masks.model_min_area" not in used_settings(first) and used_settings(first)["masks.felzenszwalb_scale"] == 3.0
