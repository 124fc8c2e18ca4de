"""Write the gradients of one step, for test_distributed.py: `python -m helpers.gradients OUT`, with any number of ranks."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers import tiny
from pixelclip.data.dataset import Batch
from pixelclip.distributed import ProcessGroup, init_process_group
from pixelclip.models.backbone import Backbone
from pixelclip.models.decoder import new_decoder
from pixelclip.models.pixelclip import PixelCLIP
from pixelclip.models.text import Prompts, TextTower


def gradients(group: ProcessGroup) -> dict[str, torch.Tensor]:
    """Return the gradient of each parameter for a batch of five images, split over the ranks; image i has i masks."""
    clip = tiny.clip_of()
    text = TextTower(clip)
    model = PixelCLIP(Backbone(clip.visual), text, Prompts(text, torch.arange(10).view(5, 2)), new_decoder(0)).train()
    generator = torch.Generator().manual_seed(3)
    weak, strong = torch.randn(2, 5, 3, 32, 32, generator=generator)
    index = torch.repeat_interleave(torch.arange(5), torch.arange(5))
    masks = torch.rand(len(index), 24, 24, generator=generator) < 0.3
    local = group.local_range(5)
    images, selected = slice(local.start, local.stop), (index >= local.start) & (index < local.stop)
    model.accumulate([Batch(weak[images], strong[images], masks[selected], index[selected] - local.start, [])], group)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with init_process_group("cpu") as group:
        values = gradients(group)
        if group.is_main:
            save_file(values, Path(sys.argv[1]))
