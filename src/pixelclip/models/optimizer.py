"""Optimizer and schedule of the training (PixelCLIP, section 4.1)."""

import math

import torch
from torch import nn

from pixelclip.config import TrainConfig
from pixelclip.models.backbone import POSITIONS
from pixelclip.models.pixelclip import PixelCLIP


def cosine_factor(step: int, steps: int, final: float) -> float:
    """Return the learning rate at a step as a fraction of the initial one: a cosine from 1 to `final`."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps))


def learning_rate_factor(group: str, step: int, config: TrainConfig) -> float:
    """Return the learning rate of one of the optimizer's groups, by name, at a step as a fraction of the initial one."""
    factor = cosine_factor(step, config.steps, config.final_learning_rate_share)
    if config.backbone_warmup and group.startswith("backbone"):
        return factor * min(1.0, (step + 1) / config.backbone_warmup)
    return factor


def make_optimizer(model: PixelCLIP, config: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW over image tower, prompts and decoder, without weight decay on norms and embeddings."""
    backbone = model.student.trained_parameters()
    norms = {id(p) for part in model.modules() if isinstance(part, nn.GroupNorm | nn.LayerNorm) for p in part.parameters()}
    groups: dict[str, tuple[float, float, list[nn.Parameter]]] = {
        "backbone": (config.learning_rate_backbone, config.weight_decay, []),
        "backbone_no_decay": (config.learning_rate_backbone, 0.0, []),
        "prompts": (config.learning_rate_prompts, 0.0, [p for p in model.prompts.parameters() if p.requires_grad]),
        "decoder": (config.learning_rate_decoder, config.weight_decay, []),
        "decoder_no_decay": (config.learning_rate_decoder, 0.0, []),
    }
    for name, parameter in backbone.items():
        no_decay = id(parameter) in norms or name.endswith(POSITIONS)
        groups["backbone_no_decay" if no_decay else "backbone"][2].append(parameter)
    for parameter in model.decoder.parameters():
        groups["decoder_no_decay" if id(parameter) in norms else "decoder"][2].append(parameter)
    return torch.optim.AdamW(
        [{"name": name, "lr": rate, "weight_decay": decay, "params": p} for name, (rate, decay, p) in groups.items() if p],
        betas=(0.9, 0.999),
        fused=True,
    )
