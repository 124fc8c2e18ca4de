import pytest
import torch
import torch.nn.functional as F

from helpers import tiny
from helpers.samples import batch
from pixelclip.data.dataset import Batch
from pixelclip.distributed import ProcessGroup
from pixelclip.models.backbone import Backbone
from pixelclip.models.decoder import Decoder, mask_loss
from pixelclip.models.pixelclip import PixelCLIP
from pixelclip.models.text import Prompts, TextTower


@pytest.fixture
def model() -> PixelCLIP:
    clip = tiny.clip_of()
    text = TextTower(clip)
    return PixelCLIP(Backbone(clip.visual), text, Prompts(text, torch.arange(10).view(5, 2)), Decoder()).train()


def test_loss_equals_boolean_indexing():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, generator=generator, requires_grad=True)
    targets = torch.rand(2, 3, 8, 8, generator=generator) < 0.2
    covered = targets.any(dim=1)
    picked = covered[:, None].expand_as(targets)
    expected = F.binary_cross_entropy_with_logits(logits[picked], targets[picked].float())
    actual = mask_loss(logits, targets, covered)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (actual, expected)))


def test_loss_without_covered_pixels_is_zero_with_zero_gradient():
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = mask_loss(logits, torch.zeros(1, 2, 4, 4, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_batch_without_masks_has_zero_loss(model):
    weak, strong, masks, index = batch()
    output = model.accumulate([Batch(weak, strong, masks[:0], index[:0], [])])
    assert output.loss.item() == 0
    assert all(p.grad is None for p in model.parameters())


def test_processes_gather_mask_cosines_once_per_step(model, monkeypatch):
    gathered, gather = [], ProcessGroup.all_gather
    monkeypatch.setattr(ProcessGroup, "all_gather", lambda self, rows: gathered.append(rows.shape) or gather(self, rows))
    model.accumulate([Batch(*batch(), [])])
    assert gathered == [(6, 5)]


def test_only_attention_position_prompts_and_decoder_get_gradients(model):
    model.accumulate([Batch(*batch(), [])])
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient
    for name in with_gradient:
        part = name.partition(".")[0]
        assert part in ("prompts", "decoder") or (part == "student" and (".attn." in name or "positional" in name)), name


def test_teacher_changes_only_in_update_teacher(model):
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter += 1
    model.accumulate([Batch(*batch(), [])])
    assert all(torch.equal(p, before[name]) for name, p in model.teacher.named_parameters())
    model.update_teacher(0.9)
    trained = set(model.student.trained_parameters())
    for name, parameter in model.teacher.named_parameters():
        expected = before[name] + (0.1 if name in trained else 0)
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-5)


def test_train_mode_keeps_teacher_and_text_in_eval_mode(model):
    assert model.student.training
    assert not model.teacher.training
    assert not model.text.training


def test_decoder_upsamples_fourfold():
    assert Decoder()(torch.randn(2, 1, 3, 5)).shape == (2, 1, 12, 20)


def test_without_clustering_every_mask_is_its_own_target():
    clip = tiny.clip_of()
    text = TextTower(clip)
    prompts = Prompts(text, torch.arange(10).view(5, 2))
    model = PixelCLIP(Backbone(clip.visual), text, prompts, Decoder(), clustering=False).train()
    weak, strong, masks, index = batch()
    index = torch.tensor([0, 0, 1, 1, 1, 1])
    terms = []
    for image in range(2):
        of_image = masks[index == image]
        features = F.interpolate(model.teacher(weak[image : image + 1]), size=(24, 24), mode="bilinear")[0]
        dense = F.normalize(model.student(strong[image : image + 1])[0], dim=0)
        covered = of_image.any(dim=0)
        for mask in of_image:
            own = F.normalize(features[:, mask].mean(dim=1), dim=0)
            logits = model.decoder(torch.einsum("chw,c->hw", dense, own)[None, None])
            logits = F.interpolate(logits, size=(24, 24), mode="bilinear")[0, 0]
            terms.append(F.binary_cross_entropy_with_logits(logits[covered], mask[covered].float(), reduction="none"))
    output = model.accumulate([Batch(weak, strong, masks, index, [])], shown=2)
    torch.testing.assert_close(output.loss, torch.cat(terms).mean())
    assert output.logits.shape == (0, 5, 24, 24)  # no pictures of an ablation whose maps are not concepts
    assert model.prompts.tokens.grad is None


def test_gradients_of_sampled_concepts_are_unbiased(model):
    weak, strong, masks, image_index = batch()

    def gradient(decoded: int) -> torch.Tensor:
        model.zero_grad()
        model.decoded_concepts = decoded
        output = model.accumulate([Batch(weak, strong, masks, image_index, [])])
        return torch.cat([p.grad.flatten() for p in model.decoder.parameters()] + [output.loss[None]]).double()

    whole = gradient(0)
    torch.manual_seed(0)
    samples = torch.stack([gradient(3) for _ in range(60)])
    error, noise = samples.mean(dim=0) - whole, samples.std(dim=0) / 60**0.5
    assert noise.norm() > 0, "concepts are sampled"
    assert error.norm() < 2 * noise.norm()
    torch.testing.assert_close(gradient(5), whole)  # of 5 concepts


def test_logits_of_concepts_that_are_not_decoded_are_minus_infinity(model):
    weak, strong, masks, image_index = batch()
    model.decoded_concepts = 2
    logits = model.accumulate([Batch(weak, strong, masks, image_index, [])], shown=2).logits
    assert logits.shape == (2, 5, 24, 24)
    assert logits.isinf().all(dim=3).all(dim=2).sum(dim=1).tolist() == [3, 3]
