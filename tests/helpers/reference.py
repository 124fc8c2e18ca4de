"""The paper's training step, implemented literally from its description, without pixelclip and without optimisation.

It loops over masks and concepts, upsamples to full size, and uses all text positions and boolean indexing.
B images, N masks, K concepts, L tokens, C embedding width, D tower width, h w feature grid, H W mask grid.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Step:
    """Result of a step: `student` [B, C, h, w], `targets` [B, K, H, W], `loss` []."""

    student: Tensor
    targets: Tensor
    loss: Tensor


def attention(block: nn.Module, x: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Softmax attention of one block on its normalised input [B, P, D], head by head; `allowed` [P, P]."""
    module, heads = block.attn, block.attn.num_heads
    normed = block.ln_1(x)
    query, key, value = F.linear(normed, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
    width, outputs = query.shape[-1] // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        outputs.append(logits.softmax(dim=-1) @ value[..., part])
    return F.linear(torch.cat(outputs, dim=-1), module.out_proj.weight, module.out_proj.bias)


def mlp(block: nn.Module, x: Tensor) -> Tensor:
    """The two linear layers of a block on its normalised input."""
    return block.mlp.c_proj(block.mlp.gelu(block.mlp.c_fc(block.ln_2(x))))


def dense_vit(visual: nn.Module, images: Tensor) -> Tensor:
    """All blocks but the last, then the value path of the last plus the CLS token as residual: [B, C, h, w]."""
    patches = visual.conv1(images)
    height, width = patches.shape[2:]
    position = visual.positional_embedding
    side = math.isqrt(len(position) - 1)
    grid = position[1:].reshape(side, side, -1).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    position = torch.cat([position[:1], grid[0].permute(1, 2, 0).reshape(height * width, -1)])
    x = patches.reshape(len(images), -1, height * width).transpose(1, 2)
    x = torch.cat([visual.class_embedding.repeat(len(images), 1, 1), x], dim=1) + position
    x = visual.ln_pre(x)
    blocks = list(visual.transformer.resblocks)
    for block in blocks[:-1]:
        x = x + attention(block, x)
        x = x + mlp(block, x)
    last = blocks[-1]
    _, _, weight = last.attn.in_proj_weight.chunk(3)
    _, _, bias = last.attn.in_proj_bias.chunk(3)
    y = last.attn.out_proj(F.linear(last.ln_1(x), weight, bias)) + x[:, 0][:, None]
    y = y + mlp(last, y)
    y = visual.ln_post(y) @ visual.proj
    return y[:, 1:].transpose(1, 2).reshape(len(images), -1, height, width)


def channel_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer norm over the channels of [B, D, h, w]."""
    mean = x.mean(dim=1, keepdim=True)
    deviation = (x.var(dim=1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return (x - mean) / deviation * norm.weight[:, None, None] + norm.bias[:, None, None]


def dense_convnext(visual: nn.Module, images: Tensor) -> Tensor:
    """ConvNeXt's stages, the norm of its head without pooling, the projection at every position: [B, C, h, w]."""
    trunk = visual.trunk
    x = channel_norm(trunk.stem[1], F.conv2d(images, trunk.stem[0].weight, trunk.stem[0].bias, stride=4))
    for stage in trunk.stages:
        if len(list(stage.downsample.children())):
            x = channel_norm(stage.downsample[0], x)
            x = F.conv2d(x, stage.downsample[1].weight, stage.downsample[1].bias, stride=2)
        for block in stage.blocks:
            y = F.conv2d(x, block.conv_dw.weight, block.conv_dw.bias, padding=3, groups=x.shape[1])
            y = channel_norm(block.norm, y)
            places = y.permute(0, 2, 3, 1).flatten(0, 2)
            first, second = block.mlp.fc1, block.mlp.fc2
            places = block.mlp.act(places @ first.weight.flatten(1).T + first.bias)
            places = (places @ second.weight.flatten(1).T + second.bias) * block.gamma
            x = x + places.unflatten(0, (len(x), y.shape[2], y.shape[3])).permute(0, 3, 1, 2)
    x = channel_norm(trunk.head.norm, x)
    return torch.einsum("bdhw,cd->bchw", x, visual.head.proj.weight)


def concepts(clip: nn.Module, tokenizer, tokens: Tensor) -> Tensor:
    """Prompts "A photo of a {t1..tL} in the scene" through the whole text tower, one by one: [K, C]."""
    ids = tokenizer(["A photo of a " + " ".join(["{}"] * tokens.shape[1]) + " in the scene"])
    allowed = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    encoded = []
    for concept in tokens:
        rows = list(clip.token_embedding(ids)[0])
        for place, learned in zip((ids[0] == 39025).nonzero()[:, 0].tolist(), concept, strict=True):
            rows[place] = learned
        x = torch.stack(rows)[None] + clip.positional_embedding
        for block in clip.transformer.resblocks:
            x = x + attention(block, x, allowed)
            x = x + mlp(block, x)
        encoded.append(clip.ln_final(x)[0, ids.argmax()] @ clip.text_projection)
    return torch.stack(encoded)


def assign(features: Tensor, prompts: Tensor, scale: float, iterations: int) -> Tensor:
    """Softmax of the scaled cosines, Sinkhorn alternating between rows and columns, argmax: [N]."""
    cosines = F.normalize(features, dim=-1) @ F.normalize(prompts, dim=-1).T
    q = (scale * cosines).softmax(dim=-1).T  # [K, N]
    q = q / q.sum()
    for _ in range(iterations):
        for concept in range(len(q)):
            q[concept] = q[concept] / q[concept].sum() / q.shape[0]
        for mask in range(q.shape[1]):
            q[:, mask] = q[:, mask] / q[:, mask].sum() / q.shape[1]
    return q.argmax(dim=0)


def decode(head: dict[str, Tensor], one: Tensor) -> Tensor:
    """The decoder on a single similarity map [h, w] -> [4h, 4w]."""
    x = F.conv2d(one[None, None], head["conv0.weight"], head["conv0.bias"], padding=1)
    for number, groups in ((1, 4), (2, 2)):
        x = F.conv_transpose2d(x, head[f"up{number}.weight"], head[f"up{number}.bias"], stride=2)
        for conv, norm in ((0, 1), (3, 4)):
            name = f"conv{number}.double_conv"
            x = F.conv2d(x, head[f"{name}.{conv}.weight"], padding=1)
            x = F.relu(F.group_norm(x, groups, head[f"{name}.{norm}.weight"], head[f"{name}.{norm}.bias"]))
    return F.conv2d(x, head["proj.weight"], head["proj.bias"], padding=1)[0, 0]


def step(
    dense_student: Tensor,
    dense_teacher: Tensor,
    prompts: Tensor,
    head: dict[str, Tensor],
    masks: list[Tensor],
    scale: float,
    iterations: int,
) -> Step:
    """Steps 5 to 9 of the method.

    Args:
        dense_student: [B, C, h, w] of the strong view.
        dense_teacher: [B, C, h, w] of the weak view.
        prompts: [K, C].
        head: the decoder's parameters by name.
        masks: per image [N_b, H, W], bool.
        scale: factor on the cosines.
        iterations: number of Sinkhorn iterations.
    """
    size = masks[0].shape[1:]
    large = F.interpolate(dense_teacher.detach(), size=size, mode="bilinear", align_corners=False)
    pooled, owner = [], []
    for image, of_image in enumerate(masks):
        for mask in of_image:
            pooled.append(large[image][:, mask].mean(dim=1))
            owner.append(image)
    targets = torch.zeros(len(masks), len(prompts), *size, dtype=torch.bool)
    if pooled:
        chosen = assign(torch.stack(pooled), prompts.detach(), scale, iterations)
        for image, concept, mask in zip(owner, chosen.tolist(), [m for of_image in masks for m in of_image], strict=True):
            targets[image, concept] |= mask
    losses = []
    for image in range(len(masks)):
        covered = targets[image].any(dim=0)
        for concept in range(len(prompts)):
            similarity = F.cosine_similarity(dense_student[image], prompts[concept][:, None, None], dim=0)
            logits = decode(head, similarity)[None, None]
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0, 0]
            expected = targets[image, concept][covered].to(logits.dtype)
            losses.append(F.binary_cross_entropy_with_logits(logits[covered], expected, reduction="none"))
    terms = torch.cat(losses)
    return Step(dense_student, targets, terms.mean() if len(terms) else terms.sum())
