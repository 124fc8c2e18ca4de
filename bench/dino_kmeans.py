"""k-means over DINO's patch tokens with scikit-learn, image by image, and with `kmeans`."""

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from bench.case import Case
from pixelclip.mask_generators.kmeans import kmeans

BATCH, SIDE, WIDTH, CLUSTERS, RESTARTS = 8, 40, 384, 16, 10  # DINO ViT-S/16 on a crop of 640 pixels
PARTS = 30


def make() -> Case:
    """Create the comparison."""
    points = tokens()
    return Case(
        what=f"k-means of {BATCH} images of {SIDE**2} tokens [{WIDTH}], k={CLUSTERS}, {RESTARTS} restarts; KMeans per image",
        baseline=lambda: Tensor([_theirs(image) for image in points]),
        ours=lambda: kmeans(points, CLUSTERS, range(BATCH), restarts=RESTARTS)[1],
        same=same,
        rounds=7,
    )


def tokens() -> Tensor:
    """Create patch tokens [B, P, D] of images with 30 parts each: smoothly varying mixtures with noise."""
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(BATCH, PARTS, WIDTH, generator=generator)
    coarse = 3 * torch.randn(BATCH, PARTS, 6, 6, generator=generator)
    mixture = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").softmax(dim=1).flatten(2)  # [B, PARTS, P]
    return mixture.transpose(1, 2) @ part + 0.5 * torch.randn(BATCH, SIDE**2, WIDTH, generator=generator)


def _theirs(image: Tensor) -> float:
    return float(KMeans(CLUSTERS, n_init=RESTARTS, random_state=0).fit(image.numpy()).inertia_)


def same(theirs: Tensor, ours: Tensor) -> str:
    """Check that the mean inertias agree within 1 %."""
    ratio = (ours / theirs).mean().item()
    assert abs(ratio - 1) <= 0.01, f"mean inertia is {ratio:.4f} of scikit-learn's"
    return f"mean inertia {ratio:.4f} of theirs"
