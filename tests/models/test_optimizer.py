"""Optimizer groups and schedule."""

import pytest
import torch

from helpers import training
from pixelclip.config import TrainConfig
from pixelclip.models.backbone import Backbone
from pixelclip.models.checkpoint import load_clip
from pixelclip.models.decoder import Decoder
from pixelclip.models.optimizer import cosine_factor, learning_rate_factor, make_optimizer
from pixelclip.models.pixelclip import PixelCLIP
from pixelclip.models.text import Prompts, TextTower

clip = training.clip


def test_optimizer_groups_cover_all_parameters_and_exempt_norms_from_decay(clip):
    clip_model = load_clip(str(clip))
    text = TextTower(clip_model.model)
    prompts = Prompts(text, torch.zeros(4, 2, dtype=torch.long))
    model = PixelCLIP(Backbone(clip_model.model.visual), text, prompts, Decoder())
    groups = make_optimizer(model, TrainConfig()).param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = "double_conv.1" not in name and "double_conv.4" not in name
            embedding = name.endswith("positional_embedding") or name == "prompts.tokens"
            assert (id(parameter) in decayed) is (plain and not embedding), name


def test_schedule_is_a_cosine_to_the_final_learning_rate():
    assert cosine_factor(0, 100, 0.5) == 1
    assert cosine_factor(50, 100, 0.5) == pytest.approx(0.75)
    assert cosine_factor(100, 100, 0.5) == pytest.approx(0.5)


GROUPS = ("backbone", "backbone_no_decay", "prompts", "decoder")


def test_warmup_raises_the_rate_of_the_image_tower_only():
    config = TrainConfig(steps=100, final_learning_rate_share=0.5, backbone_warmup=10)
    for step, warm in ((0, 0.1), (4, 0.5), (9, 1.0), (50, 1.0)):
        factors = {group: learning_rate_factor(group, step, config) for group in GROUPS}
        plain = cosine_factor(step, 100, 0.5)
        assert factors["prompts"] == factors["decoder"] == plain
        assert factors["backbone"] == factors["backbone_no_decay"] == pytest.approx(warm * plain)
    assert {learning_rate_factor(group, 0, TrainConfig()) for group in GROUPS} == {1.0}
