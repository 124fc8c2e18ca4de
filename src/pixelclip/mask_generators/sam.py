"""Segment Anything's automatic masks for batches of images (Kirillov et al., 2023; PixelCLIP, section 4.1).

B images, N masks, C embedding width, H W size of an image or crop, h w size of the decoder's output.
"""

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from segment_anything.modeling import Sam
from segment_anything.utils.amg import (
    batched_mask_to_box,
    build_all_layer_point_grids,
    calculate_stability_score,
    generate_crop_boxes,
    is_box_near_crop_edge,
    uncrop_boxes_xyxy,
    uncrop_masks,
    uncrop_points,
)
from torch import Tensor
from torchvision.ops.boxes import batched_nms, box_area

from pixelclip.config import MasksConfig
from pixelclip.data.annotations import annotate
from pixelclip.distributed import pick_device, pick_precision
from pixelclip.mask_generators import Generate
from pixelclip.mask_generators.sam2 import Sam2
from pixelclip.mask_generators.sam_checkpoint import load_sam
from pixelclip.mask_generators.sam_decoder import PointDecoder
from pixelclip.mask_generators.sam_model import mask_model

_CHUNK_PIXELS = 2**26  # logits at full size in memory at once: 256 MiB


def load_generator(weights: Path, config: MasksConfig) -> Generate:
    """Load SAM or SAM 2 on the configured device."""
    prefix, device = "sam_", pick_device(config.device)
    settings = {name.removeprefix(prefix): value for name, value in config.model_dump().items() if name.startswith(prefix)}
    settings["precision"] = pick_precision(config.sam_precision, device)
    generator = SamGenerator(load_sam(weights).to(device), **settings)

    def generate(batch: list[tuple[str, Image.Image]]) -> Iterator[dict[str, Any]]:
        for (key, image), entries in zip(batch, generator([np.asarray(image) for _, image in batch]), strict=True):
            yield {**annotate([], image.size, key), "annotations": entries}

    return generate


@dataclass(frozen=True)
class _Crop:
    """Remaining masks of one crop, best first, on the device."""

    box: list[int]  # x0 y0 x1 y1 of the crop
    logits: Tensor  # [N, h, w]; logits at full size do not fit in memory
    quality: Tensor  # [N], predicted IoU
    stability: Tensor  # [N]
    boxes: Tensor  # [N, 4], x0 y0 x1 y1 in the image, inclusive
    points: Tensor  # [N, 2], x y in the image


@dataclass(eq=False)
class SamGenerator:
    """Generate the masks of `segment_anything.SamAutomaticMaskGenerator`, or SAM 2's equivalent, for batches of images.

    The image encoder processes the whole batch at once. Masks are upscaled to full size in chunks, and copied to the host only
    after all thresholds and both suppressions.

    Args:
        sam: model on its device.
        points_per_side: points per side of a square grid; each point has three candidate masks.
        points_per_batch: number of points decoded at once; changes speed and memory, and masks only by rounding.
        pred_iou_thresh: minimum predicted IoU of a mask (exclusive); 0 keeps all.
        stability_score_thresh: minimum IoU of the mask at the threshold +- `stability_score_offset`; 0 keeps all.
        stability_score_offset: in logits.
        box_nms_thresh: box IoU threshold of non-maximum suppression in one crop.
        crop_n_layers: number of crop layers; layer i has 4 ** i crops of the image.
        crop_nms_thresh: box IoU threshold between crops; the mask of the smaller crop is kept.
        crop_overlap_ratio: overlap of the first layer's crops, as a fraction of the image's shorter side.
        crop_n_points_downscale_factor: layer i has points_per_side / factor ** i.
        min_mask_region_area: holes and islands with fewer pixels are removed; 0 keeps all.
        precision: autocast dtype of the image encoder; None for float32, which reproduces the original's masks.

    Raises:
        ValueError: a crop layer has no points.
    """

    sam: Sam | Sam2
    _: KW_ONLY
    points_per_side: int = 32
    points_per_batch: int = 256
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0
    precision: torch.dtype | None = None

    def __post_init__(self) -> None:
        if int(self.points_per_side / self.crop_n_points_downscale_factor**self.crop_n_layers) < 1:
            raise ValueError(
                f"points_per_side {self.points_per_side} leaves no points in crop layer {self.crop_n_layers} "
                f"at crop_n_points_downscale_factor {self.crop_n_points_downscale_factor}"
            )
        self._grids = build_all_layer_point_grids(self.points_per_side, self.crop_n_layers, self.crop_n_points_downscale_factor)
        self._model = mask_model(self.sam, self.precision)

    @torch.no_grad()
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[list[dict[str, Any]]]:
        """Generate the masks of every image.

        Args:
            images: RGB [H, W, 3], of any size.

        Returns:
            SA-1B annotation entries of each image: compressed RLE, boxes as x y width height in pixels.
        """
        layouts = [generate_crop_boxes(image.shape[:2], self.crop_n_layers, self.crop_overlap_ratio) for image in images]
        layers = layouts[0][1] if layouts else []
        crops: list[list[_Crop]] = [[] for _ in images]
        for index, layer in enumerate(layers):
            group = [(i, boxes[index]) for i, (boxes, _) in enumerate(layouts) if self._model.is_usable(_size(boxes[index]))]
            decoders = self._model.decoders([images[i][y0:y1, x0:x1] for i, (x0, y0, x1, y1) in group]) if group else ()
            for (i, box), decoder in zip(group, decoders, strict=True):
                if crop := self._mask_crop(decoder, box, layer, images[i].shape[:2]):
                    crops[i].append(crop)
        return [self._finish(of_image, image.shape[:2]) for of_image, image in zip(crops, images, strict=True)]

    def _mask_crop(self, decoder: PointDecoder, box: list[int], layer: int, image_size: tuple[int, int]) -> _Crop | None:
        """Decode the masks of one crop; for `box` see `_Crop`.

        Masks below the thresholds, masks cut off by the crop, and duplicates are dropped. Returns None without any mask.
        """
        size = _size(box)
        grid = self._grids[layer] * np.array(size[::-1])
        points = torch.as_tensor(grid, device=self.sam.device)
        prompts = self._model.prompts(grid, size)
        chunks: list[list[Tensor]] = []
        for logits, quality, number in decoder(prompts, self.points_per_batch, self.pred_iou_thresh):
            source = points[number]
            for part in self._chunks(len(logits), size):
                masks = self._model.upscale(logits[part], size)
                stability = calculate_stability_score(masks, self.sam.mask_threshold, self.stability_score_offset)
                boxes = batched_mask_to_box(masks > self.sam.mask_threshold)
                good = ~is_box_near_crop_edge(boxes, box, [0, 0, image_size[1], image_size[0]])
                if self.stability_score_thresh > 0:
                    good &= stability >= self.stability_score_thresh
                chunks.append([tensor[good] for tensor in (logits[part], quality[part], stability, boxes, source[part])])
        if not chunks:
            return None
        logits, quality, stability, boxes, source = (torch.cat(tensors) for tensors in zip(*chunks, strict=True))
        keep = _suppress(boxes, quality, self.box_nms_thresh)
        return _Crop(
            box=box,
            logits=logits[keep],
            quality=quality[keep],
            stability=stability[keep],
            boxes=uncrop_boxes_xyxy(boxes[keep], box),
            points=uncrop_points(source[keep], box),
        )

    def _chunks(self, count: int, size: tuple[int, int]) -> Iterator[slice]:
        """Yield slices of `count` masks that fit in memory at full size, or one empty slice."""
        step = max(1, _CHUNK_PIXELS // max(size[0] * size[1], self._model.side**2))
        return (slice(first, first + step) for first in range(0, max(count, 1), step))

    def _finish(self, crops: list[_Crop], size: tuple[int, int]) -> list[dict[str, Any]]:
        """Build the annotation entries of an image from the masks of its crops."""
        counts = [len(crop.quality) for crop in crops]
        if not sum(counts):
            return []
        boxes, quality, stability, points = (
            torch.cat([getattr(crop, name) for crop in crops]) for name in ("boxes", "quality", "stability", "points")
        )
        origin = torch.repeat_interleave(torch.tensor(counts))  # [N], index of the crop of each mask
        keep = torch.arange(len(boxes), device=boxes.device)
        if self.crop_n_layers:
            areas = box_area(torch.tensor([crop.box for crop in crops]))
            keep = _suppress(boxes, (1 / areas[origin]).to(boxes.device), self.crop_nms_thresh)
        kept = keep.tolist()
        chosen = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        chosen[keep] = True
        parts = zip(crops, chosen.split(counts), strict=True)
        codes = [code for crop, mine in parts for code in self._encode_masks(crop, mine, size)]
        code_of = dict(zip(sorted(kept), codes, strict=True))
        crop_boxes = [crops[index].box for index in origin[keep.cpu()].tolist()]
        columns = (boxes[keep], quality[keep], stability[keep], points[keep])
        rows = zip(kept, crop_boxes, *(column.tolist() for column in columns), strict=True)
        entries = [
            {
                "segmentation": {"size": list(size), "counts": code_of[mask]["counts"].decode()},
                "area": int(rle.area(code_of[mask])),
                "bbox": _to_xywh(box),
                "predicted_iou": predicted_iou,
                "stability_score": stability_score,
                "point_coords": [point],
                "crop_box": _to_xywh(crop_box),
            }
            for mask, crop_box, box, predicted_iou, stability_score, point in rows
        ]
        if self.min_mask_region_area > 0:
            entries = _clean(entries, self.min_mask_region_area, max(self.box_nms_thresh, self.crop_nms_thresh))
        return [{"id": index} | entry for index, entry in enumerate(entries)]

    def _encode_masks(self, crop: _Crop, chosen: Tensor, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
        """Encode the chosen masks of a crop as RLE in the frame of the image."""
        logits = crop.logits[chosen]
        for part in self._chunks(len(logits), size) if len(logits) else ():
            masks = self._model.upscale(logits[part], _size(crop.box)) > self.sam.mask_threshold
            masks = uncrop_masks(masks, crop.box, *size)
            # On a CPU pycocotools is faster than encode_masks; it requires contiguous columns.
            yield from encode_masks(masks) if masks.is_cuda else rle.encode(masks.transpose(1, 2).contiguous().byte().numpy().T)


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Encode masks on a GPU as COCO's compressed RLE, copying only the ends of runs to the host.

    Args:
        masks: [N, H, W], bool.

    Returns:
        The result of `pycocotools.mask.encode`: `{"size": [H, W], "counts": bytes}` for each mask.
    """
    count, height, width = masks.shape
    columns = masks.transpose(1, 2).flatten(1)  # [N, W H]: RLE is column-major
    ends = F.pad(columns[:, 1:] != columns[:, :-1], (0, 1), value=True)  # last pixel of each run
    starts_inside, lengths = columns[:, 0].tolist(), ends.sum(dim=1).tolist()
    positions = ends.nonzero()[:, 1].cpu().numpy().astype(np.int64)
    runs = [np.diff(mine, prepend=-1) for mine in np.split(positions, np.cumsum(lengths)[:-1])] if count else []
    plain = [
        {"size": [height, width], "counts": [0, *mine.tolist()] if inside else mine.tolist()}
        for mine, inside in zip(runs, starts_inside, strict=True)
    ]
    return rle.frPyObjects(plain, height, width) if plain else []


def _size(box: Sequence[int]) -> tuple[int, int]:
    """Return height and width of a box x0 y0 x1 y1."""
    x0, y0, x1, y1 = box
    return y1 - y0, x1 - x0


def _suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Apply the original's non-maximum suppression; return the indices of the kept boxes, best first."""
    return batched_nms(boxes.float(), scores, torch.zeros(len(boxes), device=boxes.device), threshold)


def _to_xywh(box: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = map(float, box)
    return [x0, y0, x1 - x0, y1 - y0]  # one pixel less than COCO's, as in the original


def _clean(entries: list[dict[str, Any]], min_area: int, threshold: float) -> list[dict[str, Any]]:
    """Remove small holes and islands, then duplicates; unchanged masks take precedence."""
    cleaned, boxes, scores = [], [], []
    for entry in entries:
        mask, changed = remove_small_regions(rle.decode(entry["segmentation"]).astype(bool), min_area)
        box = batched_mask_to_box(torch.from_numpy(mask)[None])[0]
        if changed:
            code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
            segmentation = entry["segmentation"] | {"counts": code["counts"].decode()}
            entry = entry | {"segmentation": segmentation, "area": int(rle.area(code)), "bbox": _to_xywh(box.tolist())}
        cleaned.append(entry)
        boxes.append(box)
        scores.append(float(not changed))
    keep = _suppress(torch.stack(boxes), torch.tensor(scores), threshold)
    return [cleaned[index] for index in keep.tolist()]


def remove_small_regions(mask: NDArray[np.bool_], min_area: int) -> tuple[NDArray[np.bool_], bool]:
    """Fill holes and then remove islands with fewer than `min_area` pixels; diagonal neighbours are connected.

    Args:
        mask: [H, W]; if all islands are small, the largest is kept.
        min_area: in pixels.

    Returns:
        The mask [H, W], and whether it changed.
    """
    from skimage.measure import label

    holes = label(~mask, connectivity=2)
    small_holes = np.bincount(holes.ravel()) < min_area
    small_holes[0] = False  # label 0 is the mask itself
    mask = mask | small_holes[holes]

    islands = label(mask, connectivity=2)
    sizes = np.bincount(islands.ravel())
    sizes[0] = 0
    small_islands = sizes < min_area
    small_islands[0] = False
    changed = bool(small_holes.any() or small_islands.any())  # True also if the only island is small, as in the original
    small_islands[np.argmax(sizes)] = False
    return mask & ~small_islands[islands], changed
