"""DINO's patch tokens against Meta's forward in numpy, k-means against scikit-learn, and rejected checkpoints."""

import argparse
import copy
import math
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.cluster import KMeans

from helpers.random_dino import DEPTH, GRID, PATCH, WIDTH, images, weights
from pixelclip.mask_generators.dino import load_dino, patch_tokens, segment
from pixelclip.mask_generators.kmeans import kmeans


def saved(path, content):
    torch.save(content, path)
    return path


def full_checkpoint(state, **others):
    """Build a checkpoint like Meta's training loop: wrapped modules with a projection head, settings, optimizer."""
    head = {"head.mlp.0.weight": torch.zeros(4, WIDTH), "head.last_layer.weight_g": torch.ones(4, 1)}
    teacher = {f"backbone.{name}": tensor for name, tensor in state.items()} | head
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in teacher.items()}
    settings = argparse.Namespace(arch="vit_small", patch_size=16, lr=5e-4)
    return {"student": student, "teacher": teacher, "epoch": 800, "args": settings, "optimizer": {"state": {}}} | others


def naive_tokens(state, image, heads):
    """Compute Meta's forward of one image [3, H, W] in double precision: [h, w, D]."""
    w = {name: tensor.double().numpy() for name, tensor in state.items()}
    kernel, position = w["patch_embed.proj.weight"], w["pos_embed"][0]
    width, _, patch, _ = kernel.shape
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    position_map = naive_resize(position[1:].reshape(GRID, GRID, width), rows, columns)
    tokens = [w["cls_token"][0, 0] + position[0]]
    for i in range(rows):
        for j in range(columns):
            part = image.double().numpy()[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            tokens.append((kernel * part).sum((1, 2, 3)) + w["patch_embed.proj.bias"] + position_map[i, j])
    x = np.stack(tokens)

    def norm(x, name):
        centred = x - x.mean(1, keepdims=True)
        return centred / np.sqrt(x.var(1, keepdims=True) + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for i in range(DEPTH):
        block = f"blocks.{i}"
        query, key, value = np.split(linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv"), 3, axis=1)
        mixed = []
        for part in np.split(np.arange(width), heads):
            scores = np.exp(query[:, part] @ key[:, part].T / math.sqrt(width // heads))
            mixed.append(scores / scores.sum(1, keepdims=True) @ value[:, part])
        x = x + linear(np.concatenate(mixed, axis=1), f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))), f"{block}.mlp.fc2")
    return norm(x, "norm")[1:].reshape(rows, columns, width)


def naive_resize(maps, rows, columns):
    """Resize with Keys' cubic kernel (a = -0.75), repeated borders and Meta's scale, which adds a tenth of a patch."""
    if maps.shape[:2] == (rows, columns):
        return maps

    def kernel(t):
        t = abs(t)
        return 1.25 * t**3 - 2.25 * t**2 + 1 if t <= 1 else -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    def matrix(large, small):
        taps = np.zeros((large, small))
        for i in range(large):
            at = (i + 0.5) * small / (large + 0.1) - 0.5
            for j in range(math.floor(at) - 1, math.floor(at) + 3):
                taps[i, min(max(j, 0), small - 1)] += kernel(at - j)
        return taps

    return np.einsum("ia,jb,abd->ijd", matrix(rows, maps.shape[0]), matrix(columns, maps.shape[1]), maps)


def blobs(batch, count, width, groups, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, groups, width, generator=generator) * spread
    member = torch.randint(0, groups, (batch, count, 1), generator=generator)
    return centres.gather(1, member.expand(-1, -1, width)) + torch.randn(batch, count, width, generator=generator)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return load_dino(saved(tmp_path_factory.mktemp("dino") / "dino.pth", weights()))


def test_loading_freezes_the_model_and_draws_no_random_numbers(tmp_path):
    before = torch.get_rng_state()
    model = load_dino(saved(tmp_path / "half.pt", {name: tensor.half() for name, tensor in weights().items()}))
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32 and parameter.device.type == "cpu" and not parameter.requires_grad


@pytest.mark.parametrize(("width", "heads"), [(32, 1), (128, 2), (384, 6)])
def test_architecture_is_derived_from_the_state_dict(tmp_path, width, heads):
    model = load_dino(saved(tmp_path / "dino.pth", weights(width, depth=3, patch=2, grid=3)))
    assert (model.embed_dim, len(model.blocks), model.patch_embed.patch_size) == (width, 3, (2, 2))
    assert (model.patch_embed.grid_size, model.blocks[0].attn.num_heads) == ((3, 3), heads)
    assert {part.eps for part in model.modules() if isinstance(part, torch.nn.LayerNorm)} == {1e-6}


def test_all_checkpoint_formats_give_the_same_tokens(tmp_path, vit):
    state, seen = weights(), images(2, 3, 12, 24)
    save_file(state, tmp_path / "timm.safetensors")
    full = full_checkpoint(state)
    student = {"student": {f"module.{name}": tensor for name, tensor in full["teacher"].items()}, "epoch": 1}
    paths = [
        tmp_path / "timm.safetensors",
        saved(tmp_path / "full.pth", full),
        saved(tmp_path / "student.pth", student),
        saved(tmp_path / "module.pt", {f"module.{name}": tensor for name, tensor in state.items()}),
    ]
    for path in paths:
        assert torch.equal(patch_tokens(load_dino(path), seen), patch_tokens(vit, seen))


@pytest.mark.parametrize("size", [(20, 20), (12, 28), (20, 24), (40, 8)])
def test_tokens_equal_those_of_metas_forward(vit, size):
    seen = images(2, 3, *size)
    tokens = patch_tokens(vit, seen)
    assert tokens.shape == (2, size[0] // PATCH, size[1] // PATCH, WIDTH)
    for image, found in zip(seen, tokens, strict=True):
        np.testing.assert_allclose(found.numpy(), naive_tokens(weights(), image, heads=2), atol=2e-5)


def test_timm_agrees_only_at_the_native_size(vit):
    native, larger = images(1, 3, 20, 20), images(1, 3, 40, 40)
    torch.testing.assert_close(patch_tokens(vit, native).flatten(1, 2), vit.forward_features(native)[:, 1:])
    assert (patch_tokens(vit, larger).flatten(1, 2) - vit.forward_features(larger)[:, 1:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {"visual.class_embedding": torch.zeros(4)},
            "found visual.class_embedding, but not cls_token, pos_embed",
        ),
        (lambda state: {f"image_encoder.{name}": t for name, t in state.items()}, "found image_encoder.*but not cls_token"),
        (lambda state: {"model": state, "epoch": 3}, "found entries that are not tensors"),
        (lambda state: {}, "found nothing, but not"),
        (lambda state: [1, 2], "expected named tensors, found a list"),
        (lambda state: state | {"head.weight": torch.zeros(10, WIDTH)}, "unexpected: head.weight"),
        (lambda state: state | {"blocks.0.ls1.gamma": torch.zeros(WIDTH)}, "unexpected: blocks.0.ls1.gamma"),
        (lambda state: {n: t for n, t in state.items() if n != "blocks.1.mlp.fc2.bias"}, "missing: blocks.1.mlp.fc2.bias"),
        (lambda state: state | {"norm.bias": torch.zeros(7)}, r"norm.bias \[7\] instead of \[128\]"),
        (lambda state: state | {"pos_embed": torch.zeros(1, 12, WIDTH)}, "12 positions do not fit a ViT with a square grid"),
        (lambda state: state | {"pos_embed": torch.zeros(WIDTH)}, r"pos_embed is \[128\]"),
        (lambda state: state | {"pos_embed": torch.zeros(1, 0, WIDTH)}, "0 positions do not fit a ViT"),
        (lambda state: full_checkpoint(state, teacher={"backbone.x": torch.zeros(1)}), "found x, but not cls_token"),
    ],
)
def test_other_weights_are_rejected(tmp_path, change, message):
    path = saved(tmp_path / "other.pth", change(weights()))
    with pytest.raises(ValueError, match=message) as caught:
        load_dino(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("expected a DINO ViT as published by timm or Meta")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dino.pth", "dino.safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 10, 1000, 200_000])
def test_damaged_file_is_rejected(tmp_path, name, kept):
    save_file(weights(), tmp_path / "dino.safetensors")
    whole = saved(tmp_path / "dino.pth", weights()) if name.endswith("pth") else tmp_path / name
    path = tmp_path / f"cut_{name}"
    path.write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut_dino.*(truncated|not a checkpoint).*expected a DINO ViT"):
        load_dino(path)


def test_file_that_is_not_a_checkpoint_is_rejected(tmp_path):
    (tmp_path / "page.pth").write_text("<!doctype html><title>404</title>")
    with pytest.raises(ValueError, match=r"page\.pth: .*not a checkpoint"):
        load_dino(tmp_path / "page.pth")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # TorchScript, cut off
        archive.writestr("script/constants.pkl", b"")
        archive.writestr("script/version", "3")
    with pytest.raises(ValueError, match=r"script\.pt: truncated, or not a checkpoint \(.*\);") as caught:
        load_dino(tmp_path / "script.pt")
    assert "Re-running" not in str(caught.value)
    for path in (tmp_path, tmp_path / "absent.pth", tmp_path / "absent.safetensors"):
        with pytest.raises(ValueError, match=f"{path}: no such file"):
            load_dino(path)


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


WRITERS = [saved, *(lambda path, content, p=p: path.write_bytes(pickle.dumps(content, protocol=p)) for p in (2, 5))]


@pytest.mark.parametrize("write", WRITERS)
def test_pickle_with_code_is_rejected_without_running_it(tmp_path, write):
    trap = tmp_path / "trap"
    content = weights() | {"x": Evil(trap)}
    pickle.loads(pickle.dumps(content))
    trap.rmdir()  # the trap works
    write(tmp_path / "evil.pth", content)
    with pytest.raises(ValueError, match=r"evil\.pth: (would execute \S+, which is not allowed|not a checkpoint)"):
        load_dino(tmp_path / "evil.pth")
    assert not trap.exists()


@pytest.mark.parametrize("k", [2, 6, 16])
@pytest.mark.parametrize("spread", [0, 0.5, 10])
def test_inertia_is_as_low_as_scikit_learns(k, spread):
    points = blobs(4, 150, 24, groups=6, spread=spread)
    truth = [KMeans(k, n_init=10, random_state=0).fit(image.numpy()).inertia_ for image in points]
    for first in (0, 10, 20):
        _, inertia = kmeans(points, k, range(first, first + 4))
        assert np.mean(inertia.numpy() / truth) <= 1.01


def test_inertia_of_tokens_is_as_low_as_scikit_learns(vit):
    tokens = patch_tokens(vit, images(3, 3, 40, 48)).flatten(1, 2)
    _, inertia = kmeans(tokens, 16, [0, 1, 2])
    truth = [KMeans(16, n_init=10, random_state=0).fit(image.numpy()).inertia_ for image in tokens]
    assert np.mean(inertia.numpy() / truth) <= 1.01


@pytest.mark.parametrize("offset", [0, 1e4])
def test_every_point_is_assigned_to_its_nearest_centre(offset):
    points = blobs(3, 60, 5, groups=4, spread=1) + offset
    labels, inertia = kmeans(points, 5, [3, 1, 2])
    assert labels.shape == (3, 60) and labels.dtype == torch.int64
    for image, label, total in zip(points.double().numpy(), labels.numpy(), inertia.tolist(), strict=True):
        centres = [image[label == cluster].mean(0) for cluster in range(5)]
        squares = [[((point - centre) ** 2).sum() for centre in centres] for point in image]
        assert label.tolist() == np.argmin(squares, axis=1).tolist()
        assert total == pytest.approx(np.min(squares, axis=1).sum(), rel=1e-9)


def test_labels_do_not_depend_on_the_batch():
    points = torch.cat([blobs(4, 80, 16, groups=7, spread=0.5), torch.ones(1, 80, 16)])
    seeds = [5, 0, 5, 7, 1]
    before = torch.get_rng_state()
    labels, inertia = kmeans(points, 8, seeds)
    again, _ = kmeans(points, 8, seeds)
    assert torch.equal(labels, again) and torch.equal(torch.get_rng_state(), before)
    for order in ([3], [4, 1], [2, 0, 3, 1, 4]):
        some, their_inertia = kmeans(points[order], 8, [seeds[i] for i in order])
        assert torch.equal(some, labels[order])
        torch.testing.assert_close(their_inertia, inertia[order])


@pytest.mark.parametrize("scale", [1e-9, 1e25])
def test_labels_do_not_depend_on_the_scale_of_the_points(scale):
    points = blobs(2, 90, 12, groups=4, spread=1)
    assert torch.equal(kmeans(points * scale, 6, [0, 1])[0], kmeans(points, 6, [0, 1])[0])


def test_labels_do_not_depend_on_short_precision(monkeypatch):
    points = blobs(2, 300, 24, groups=1, spread=0)
    found = kmeans(points, 12, [0, 1])
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")  # computes everything in float64
    for one, other in zip(found, kmeans(points, 12, [0, 1]), strict=True):
        assert torch.equal(one, other)


def test_seeds_matter_and_more_restarts_never_increase_inertia():
    points = blobs(1, 90, 12, groups=1, spread=0).expand(6, -1, -1)
    found = [kmeans(points, 10, range(6), restarts=restarts)[1] for restarts in (1, 3, 9)]
    assert len(set(found[0].tolist())) > 1
    assert (found[1] <= found[0]).all() and (found[2] <= found[1]).all()


def test_fewer_iterations_give_a_higher_inertia():
    points = blobs(2, 90, 6, groups=1, spread=0)
    capped = kmeans(points, 9, [0, 1], iterations=1, restarts=1)[1]
    assert (kmeans(points, 9, [0, 1], restarts=1)[1] < capped).all()


@pytest.mark.parametrize("k", [1, 3, 5, 40])
def test_fewer_distinct_points_give_fewer_clusters(k):
    three = blobs(2, 3, 33, groups=1, spread=0).repeat(1, 7, 1)
    same = torch.full((1, 21, 33), 0.1)
    labels, inertia = kmeans(torch.cat([three, same]), k, [0, 1, 2])
    assert [sorted(set(row.tolist())) for row in labels] == [list(range(min(k, 3)))] * 2 + [[0]]
    if k >= 3:
        assert inertia.tolist() == [0, 0, 0]
        assert torch.equal(labels[:, :3].repeat(1, 7), labels)


def test_empty_cluster_restarts_at_the_farthest_point(monkeypatch):
    points = blobs(2, 40, 3, groups=4, spread=30)
    at_one_point = points[:, None, :1].double().expand(-1, 1, 4, -1)
    monkeypatch.setattr("pixelclip.mask_generators.kmeans._start", lambda points, norms, random: at_one_point)
    labels, _ = kmeans(points, 4, [0, 1])
    assert [sorted(set(row.tolist())) for row in labels] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(4, 3), r"points are \[4, 3\]"),
        (torch.zeros(1, 0, 3), "at least one point"),
        (torch.full((1, 4, 3), math.nan), "expected finite"),
    ],
)
def test_invalid_input_of_kmeans_is_rejected(points, message):
    with pytest.raises(ValueError, match=message):
        kmeans(points, 2, [0])


def test_empty_batch_gives_no_labels():
    labels, inertia = kmeans(torch.zeros(0, 4, 3), 2, [])
    assert labels.shape == (0, 4) and inertia.shape == (0,)


def test_segment_finds_the_regions_of_an_image(vit):
    part = torch.zeros(6, 9, dtype=torch.long)
    part[:, 4:], part[3:, 4:] = 1, 2
    colours = torch.tensor([[-2.0, 0, 2], [2, 2, -2], [0, -2, 0]])
    picture = colours[part].permute(2, 0, 1).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[None]
    flat = copy.deepcopy(vit)
    flat.pos_embed.zero_()  # patches then differ only by colour
    labels = segment(flat, picture, 3, [0])
    assert labels.shape == (1, 6, 9) and labels.dtype == torch.int64
    pairs = set(zip(part.flatten().tolist(), labels.flatten().tolist(), strict=True))
    assert len(pairs) == 3 and {label for _, label in pairs} == {0, 1, 2}


@pytest.mark.gpu
def test_gpu_labels_equal_cpu_labels(vit):
    points = blobs(4, 200, 32, groups=6, spread=1)
    labels, inertia = kmeans(points, 8, range(4))
    their_labels, their_inertia = kmeans(points.cuda(), 8, range(4))
    assert torch.equal(their_labels.cpu(), labels)
    torch.testing.assert_close(their_inertia.cpu(), inertia)
