"""Random weights of small SAMs, and settings under which they find masks."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

WIDTH = 32


LOOSE = {"points_per_side": 9, "points_per_batch": 64, "stability_score_thresh": 0.75}  # random weights give few stable masks


ALL = LOOSE | {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 0.4}


SETTINGS = {
    "loose": LOOSE,
    "strict": LOOSE | {"pred_iou_thresh": 1.5, "stability_score_thresh": 0.9, "stability_score_offset": 0.5},
    "all": ALL,
    "crops": LOOSE | {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2},
    "two layers": LOOSE
    | {"crop_n_layers": 2, "crop_n_points_downscale_factor": 3, "crop_nms_thresh": 0.5, "crop_overlap_ratio": 0.2},
    "clean": LOOSE | {"min_mask_region_area": 60},
    "clean crops": LOOSE | {"min_mask_region_area": 900, "crop_n_layers": 1, "crop_n_points_downscale_factor": 2},
}


class Prompts(PromptEncoder):
    def _embed_points(self, points, labels, pad):
        embedded = super()._embed_points(points, labels, pad)
        self.place = embedded[:, 0]
        return embedded


class Features(torch.nn.Module):
    def __init__(self, plain, prompts):
        super().__init__()
        self.plain, self.prompts = plain, [prompts]

    def forward(self, x):
        features = self.plain(x)
        place = F.interpolate(self.prompts[0].get_dense_pe(), scale_factor=4, mode="bilinear")
        return torch.cat([features, place.expand(len(x), -1, -1, -1), torch.ones_like(features[:, :1])], dim=1)


class Network(torch.nn.Module):
    def __init__(self, plain, prompts, least):
        super().__init__()
        self.plain, self.prompts, self.least = plain, [prompts], least

    def forward(self, x):
        weights, place = self.plain(x), self.prompts[0].place
        return torch.cat([weights, 40 / 16 * place, torch.full_like(weights[:, :1], -40 * self.least)], dim=1)


def make_local(sam: Sam) -> Sam:
    decoder, prompts = sam.mask_decoder, sam.prompt_encoder
    prompts.__class__ = Prompts
    decoder.output_upscaling = Features(decoder.output_upscaling, prompts)
    networks = zip(decoder.output_hypernetworks_mlps, (0.0, 0.3, 0.5, 0.7), strict=True)
    decoder.output_hypernetworks_mlps = torch.nn.ModuleList(Network(plain, prompts, least) for plain, least in networks)
    return sam


def make_sam() -> Sam:
    encoder = ImageEncoderViT(
        img_size=128,
        embed_dim=32,
        depth=2,
        num_heads=2,
        out_chans=WIDTH,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1,),
    )
    prompts = PromptEncoder(WIDTH, (8, 8), (128, 128), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=WIDTH, num_heads=8, mlp_dim=64)
    sam = Sam(encoder, prompts, MaskDecoder(transformer_dim=WIDTH, transformer=transformer, iou_head_hidden_dim=24))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sam.requires_grad_(False).state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("gaussian_matrix"):
            tensor.copy_(noise * 0.5)
        elif tensor.ndim == 1:
            tensor.copy_(noise * 0.1 + name.endswith("weight"))
        else:
            tensor.copy_(noise * 2 / tensor[0].numel() ** 0.5)
    prompts.point_embeddings[1].weight.zero_()
    return sam.eval()


@pytest.fixture(scope="module")
def sam() -> Sam:
    return make_local(make_sam())


@pytest.fixture(scope="module")
def plain() -> Sam:
    return make_sam()


def best_ious(found: list[dict], others: list[dict]) -> np.ndarray:
    codes = [[entry["segmentation"] for entry in entries] for entries in (found, others)]
    return rle.iou(*codes, [0] * len(others)).max(1)
