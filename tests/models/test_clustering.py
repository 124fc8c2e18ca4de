import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelclip.models.clustering import merge_by_concept, pool_masks, sinkhorn


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(8, 40), st.integers(8, 40), st.integers(0, 9))
def test_pooling_equals_upsampling_and_averaging(images, height, width, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, 5, height, width, generator=generator)
    masks = torch.rand(4, rows, columns, generator=generator) < 0.3
    masks[:, 0, 0] = True
    owner = torch.randint(0, images, (4,), generator=generator)
    large = F.interpolate(features, size=(rows, columns), mode="bilinear", align_corners=False)
    expected = torch.stack([F.normalize(large[i][:, mask].mean(dim=1), dim=0) for mask, i in zip(masks, owner, strict=True)])
    torch.testing.assert_close(pool_masks(features, masks, owner), expected, atol=2e-6, rtol=1e-4)


def test_empty_mask_pools_to_zero():
    pooled = pool_masks(torch.randn(1, 5, 3, 3), torch.zeros(1, 8, 8, dtype=torch.bool), torch.zeros(1, dtype=torch.long))
    assert not pooled.any()


def test_no_masks_give_empty_results():
    pooled = pool_masks(torch.randn(1, 5, 3, 3), torch.zeros(0, 8, 8, dtype=torch.bool), torch.zeros(0, dtype=torch.long))
    assert pooled.shape == (0, 5)
    assert sinkhorn(torch.zeros(0, 4)).shape == (0, 4)


def test_sinkhorn_equals_a_naive_loop():
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    table = [[value.exp().item() for value in row] for row in logits]
    table = [[value / sum(row) for value in row] for row in table]
    for _ in range(3):
        for k in range(4):
            total = sum(row[k] for row in table)
            for row in table:
                row[k] /= 4 * total
        for row in table:
            total = sum(row)
            row[:] = [value / total / 7 for value in row]
    expected = torch.tensor(table) * 7
    torch.testing.assert_close(sinkhorn(logits, 3), expected)


def test_sinkhorn_balances_concepts_where_argmax_collapses():
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) + torch.tensor([9.0, *[0.0] * 7])
    assert (logits.argmax(dim=1) == 0).all()
    assert sinkhorn(logits, 50).sum(dim=0) == pytest.approx([8.0] * 8, rel=1e-3)


def test_sinkhorn_stays_finite_when_a_concept_underflows():
    assignment = sinkhorn(torch.tensor([[0.0, -1e4], [0.0, -1e4]]))
    assert torch.isfinite(assignment).all()


def test_merging_equals_a_naive_loop():
    generator = torch.Generator().manual_seed(2)
    masks = torch.rand(9, 6, 5, generator=generator) < 0.4
    owner, concept = torch.randint(0, 3, (9,), generator=generator), torch.randint(0, 4, (9,), generator=generator)
    merged = merge_by_concept(masks, owner, concept, 3, 4)
    for image in range(3):
        for k in range(4):
            for y in range(6):
                for x in range(5):
                    expected = any(bool(masks[n, y, x]) for n in range(9) if owner[n] == image and concept[n] == k)
                    assert bool(merged[image, k, y, x]) is expected
