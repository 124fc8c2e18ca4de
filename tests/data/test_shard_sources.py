"""Shards in a folder or an object store: listing, download on first read, identity, streaming in training."""

import json
import threading

import pytest
import torch

from helpers import tiny
from helpers.fake_data import annotation, encoded, pixels, read_tar, write_files, write_tar
from helpers.s3_sources import QUARTERS, put, sources
from helpers.samples import FULL
from helpers.training import SMALL, losses
from pixelclip import evaluate, masks, shards, train
from pixelclip.config import EvaluateConfig, MasksConfig, ShardsConfig, TrainConfig
from pixelclip.data.dataset import MaskedImages, collate, sample_indices
from pixelclip.data.shard_format import index_shard
from pixelclip.data.shard_sources import RemoteFile, describe_shards, list_shards
from pixelclip.evaluation.classify import GivenMasks
from pixelclip.storage.files import read_json


def test_shards_of_a_prefix_are_downloaded_when_they_are_read(bucket, cache, tmp_path):
    put(bucket, sources(tmp_path / "here"), "sa1b")
    bucket.put_object(Bucket="data", Key="sa1b/README.md", Body=b"no shard")
    shards = list_shards("s3://data/sa1b/")
    assert [(shard.name, shard.stem) for shard in shards] == [("0.tar", "0"), ("1.tar", "1"), ("2.tar", "2")]
    assert not list(cache.rglob("*.tar"))
    assert index_shard(shards[1]) == index_shard(tmp_path / "here" / "1.tar")
    assert [path.name for path in cache.rglob("*.tar")] == ["1.tar"]


def test_shards_in_a_store_are_identified_by_content(bucket, tmp_path):
    put(bucket, sources(tmp_path / "here"), "one")
    put(bucket, sources(tmp_path / "here"), "two")
    one, two = describe_shards("s3://data/one"), describe_shards("s3://data/two/")
    assert one["md5"] == two["md5"] and one["path"] == "s3://data/one"
    assert (one["num_files"], one["size"]) == (3, sum(p.stat().st_size for p in (tmp_path / "here").iterdir()))
    bucket.put_object(Bucket="data", Key="two/2.tar", Body=b"changed")
    assert describe_shards("s3://data/two")["md5"] != one["md5"]


def test_manifest_lists_local_and_remote_shards(bucket, tmp_path):
    here = sources(tmp_path / "here", 2)
    put(bucket, here, "there")
    manifest = tmp_path / "shards.txt"
    manifest.write_text("here/0.tar\ns3://data/there/1.tar\n")
    shards = list_shards(manifest)
    assert [str(shard) for shard in shards] == [str(here / "0.tar"), "s3://data/there/1.tar"]
    assert index_shard(shards[1]) == index_shard(here / "1.tar")
    manifest.write_text("s3://data/there/9.tar\n")
    with pytest.raises(ValueError, match=r"1 of its shards are missing, the first is s3://data/there/9\.tar"):
        list_shards(manifest)
    bucket.put_object(Bucket="data", Key="list.txt", Body=b"s3://data/there/0.tar\n")
    assert [str(shard) for shard in list_shards("s3://data/list.txt")] == ["s3://data/there/0.tar"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://data/nothing", "s3://data/nothing: contains no shard"),
        ("s3://nowhere/a", "s3://nowhere/a: there is no such bucket"),
        ("s3:///a", "s3:///a: expected s3://bucket/key"),
        ("s3:/data/a", "s3:/data/a: no such folder or manifest"),
    ],
)
def test_unusable_uris_are_rejected(bucket, uri, message):
    with pytest.raises(ValueError, match=message):
        list_shards(uri)


def test_shard_that_changes_after_listing_is_rejected(bucket, tmp_path):
    put(bucket, sources(tmp_path / "here", 1), "changing")
    (shard,) = list_shards("s3://data/changing")
    bucket.put_object(Bucket="data", Key="changing/0.tar", Body=b"other")
    with pytest.raises(ValueError, match=r"changing/0\.tar: the file changed in the store"):
        shard.open()


def test_evicted_shard_is_downloaded_again(bucket, cache, tmp_path):
    put(bucket, sources(tmp_path / "here", 1), "evicted")
    (shard,) = list_shards("s3://data/evicted")
    before = index_shard(shard)
    for path in cache.rglob("0.tar"):
        path.unlink()
    assert index_shard(shard) == before


def test_masks_and_training_give_equal_results_from_a_store_and_a_folder(bucket, tmp_path, monkeypatch):
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    put(bucket, sources(tmp_path / "here"), "images")
    config = MasksConfig(workers=0, generator="given", shortest_edge=20)
    masks.run(tmp_path / "here", tmp_path / "local", config)
    masks.run("s3://data/images", tmp_path / "remote", config)
    for name in ("0.tar", "1.tar", "2.tar"):
        assert read_tar(tmp_path / "local" / name) == read_tar(tmp_path / "remote" / name)
    described = read_json(tmp_path / "remote" / "provenance.json")["inputs"]["shards"]
    assert described["path"] == "s3://data/images"

    put(bucket, tmp_path / "local", "masks")
    clip = tiny.clip_folder(tmp_path / "clip")
    settings = TrainConfig(**{**SMALL, "clip": str(clip), "steps": 3, "workers": 0})
    losses = [
        train.run(source, tmp_path / name, settings)["train/loss"]
        for name, source in (("a", tmp_path / "local"), ("b", "s3://data/masks"))
    ]
    assert losses[0] == losses[1]
    chain = read_json(tmp_path / "b" / "provenance.json")["inputs"]["masks"]
    assert chain["path"] == "s3://data/masks" and chain["provenance"]["stage"] == "masks"


def test_incomplete_mask_parts_in_a_store_are_rejected(bucket, tmp_path):
    here = sources(tmp_path / "here")
    for number in (1, 3):
        out = tmp_path / "parts" / f"part{number}"
        masks.run(here, out, MasksConfig(workers=0, generator="given", part=f"{number}/3"))
    put(bucket, tmp_path / "parts", "parts")
    with pytest.raises(ValueError, match="s3://data/parts: contains parts, but not 2/3"):
        list_shards("s3://data/parts")
    masks.run(here, tmp_path / "parts" / "part2", MasksConfig(workers=0, generator="given", part="2/3"))
    put(bucket, tmp_path / "parts", "parts")
    assert sorted(shard.name for shard in list_shards("s3://data/parts")) == ["0.tar", "1.tar", "2.tar"]
    assert describe_shards("s3://data/parts")["provenance"]["settings"]["generator"] == "given"


@pytest.mark.parametrize("where", ["folder", "store"])
def test_parts_are_read_in_the_order_of_their_shards(bucket, tmp_path, where):
    here, parts = sources(tmp_path / "here", 5), tmp_path / "parts"
    masks.run(here, tmp_path / "whole", MasksConfig(workers=0, generator="given"))
    for number, folder in enumerate(("c", "a", "b"), 1):
        masks.run(here, parts / folder, MasksConfig(workers=0, generator="given", part=f"{number}/3"))
    put(bucket, parts, "parts")
    listed = list_shards(parts if where == "folder" else "s3://data/parts")
    assert [shard.name for shard in listed] == [f"{number}.tar" for number in range(5)]
    whole, joined = (MaskedImages(tars, FULL, seed=1) for tars in (list_shards(tmp_path / "whole"), listed))
    for indices in sample_indices(4, range(4), 1, 0, 5):
        one, other = (collate([dataset[index] for index in indices]) for dataset in (whole, joined))
        assert torch.equal(one.weak, other.weak) and torch.equal(one.strong, other.strong)
        assert torch.equal(one.masks, other.masks) and one.counts == other.counts


def test_parts_and_whole_masks_train_the_same_model(tmp_path, monkeypatch):
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    here, clip = sources(tmp_path / "here", 5), tiny.clip_folder(tmp_path / "clip")
    masks.run(here, tmp_path / "whole", MasksConfig(workers=0, generator="given"))
    for number in (1, 2, 3):
        masks.run(here, tmp_path / "parts" / f"part{number}", MasksConfig(workers=0, generator="given", part=f"{number}/3"))
    settings = TrainConfig(**{**SMALL, "clip": str(clip), "steps": 4})
    for name in ("whole", "parts"):
        train.run(tmp_path / name, tmp_path / "models" / name, settings)
    assert losses(tmp_path / "models" / "whole") == losses(tmp_path / "models" / "parts")
    weights = [(tmp_path / "models" / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_training_shuffles_within_groups_of_shards(tmp_path):
    folder = sources(tmp_path / "here", 5)
    dataset = MaskedImages(list_shards(folder), FULL, seed=1, shards_at_once=2)
    for epoch in range(3):
        order = [dataset.member(epoch * 10 + offset) for offset in range(10)]
        assert sorted(order) == list(range(10))
        shards = [member // 2 for member in order]  # two images per shard
        groups = [set(shards[:4]), set(shards[4:8]), set(shards[8:])]
        assert [len(group) for group in groups] == [2, 2, 1]
    assert dataset.member(3) == MaskedImages(list_shards(folder), FULL, seed=1, shards_at_once=2).member(3)


def test_next_shards_are_prefetched(bucket, cache, tmp_path, monkeypatch):
    put(bucket, sources(tmp_path / "here", 4), "stream")
    dataset = MaskedImages(list_shards("s3://data/stream"), FULL, seed=1, shards_at_once=1)
    for path in cache.rglob("*.tar"):
        path.unlink()
    opened = []
    read = RemoteFile.open
    monkeypatch.setattr(RemoteFile, "open", lambda self, mode="rb": opened.append(self.name) or read(self, mode))
    first, second = (f"{dataset.member(position) // 2}.tar" for position in (0, 2))
    assert not isinstance(dataset[0], str)
    for thread in [thread for thread in threading.enumerate() if thread.name.endswith("(_prefetch)")]:
        thread.join()
    assert {first, second} == set(opened)
    assert {path.name for path in cache.rglob("*.tar")} == {first, second}


def test_given_masks_are_matched_by_image_name(bucket, tmp_path):
    write_files(tmp_path / "json", {"a.b.json": annotation(QUARTERS)})
    write_tar(tmp_path / "tars" / "0.tar", {"sub/a_b.jpg": b"x", "sub/a_b.json": annotation(QUARTERS)})
    put(bucket, tmp_path / "tars", "tars")
    annotations = [
        GivenMasks(str(source)).read("a.b", (48, 40)) for source in (tmp_path / "json", tmp_path / "tars", "s3://data/tars")
    ]
    assert annotations[0] == annotations[1] == annotations[2] and len(annotations[0]) == 4
    with pytest.raises(ValueError, match=r"tars: c: no masks in these shards"):
        GivenMasks(str(tmp_path / "tars")).read("c", (48, 40))
    write_tar(tmp_path / "tars" / "1.tar", {"a_b.jpg": b"x", "a_b.json": json.dumps({"annotations": []}).encode()})
    with pytest.raises(ValueError, match=r"two samples named a_b: sub/a_b in .*0\.tar, a_b in .*1\.tar"):
        GivenMasks(str(tmp_path / "tars"))
    (tmp_path / "tars" / "0.tar").unlink()
    assert GivenMasks(str(tmp_path / "tars")).read("a.b", (48, 40)) == []


def test_images_and_labelled_sets_give_equal_results_from_a_store_and_a_folder(bucket, tmp_path, monkeypatch):
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    write_files(tmp_path / "images", {f"{n}.jpg": encoded(pixels(40, 48, n)) for n in range(3)})
    put(bucket, tmp_path / "images", "images")
    assert shards.run("s3://data/images", tmp_path / "shards", ShardsConfig())["images"] == 3
    shards.run(tmp_path / "images", tmp_path / "again", ShardsConfig())
    assert (tmp_path / "shards" / "000000.tar").read_bytes() == (tmp_path / "again" / "000000.tar").read_bytes()
    described = read_json(tmp_path / "shards" / "provenance.json")["inputs"]["images"]["path"]
    assert described == "s3://data/images"

    model = tiny.model_folder(tmp_path / "model", tiny.clip_folder(tmp_path / "clip"))
    put(bucket, tiny.labelled_set(tmp_path / "set"), "set")
    config = EvaluateConfig(device="cpu", pictures=1)
    remote = evaluate.run(model, "s3://data/set", tmp_path / "there", config)
    assert remote == evaluate.run(model, tmp_path / "set", tmp_path / "here", config)
