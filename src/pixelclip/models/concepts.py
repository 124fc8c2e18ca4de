"""Initialize the concepts: from random words, class names, or the words that describe the masks of the data best.

N masks, W words, K concepts, L prompt tokens per concept, C embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelclip.config import TrainConfig
from pixelclip.data.class_names import names_of
from pixelclip.models.text import TEMPLATES, Prompts, TextTower, Vectors, classifier

_WORDS_AT_ONCE = 256
_MAX_MASKS = 4096  # the scores of as many masks and 40,000 words take 650 MB


def new_concepts(text: TextTower, config: TrainConfig, mask_features: Tensor | None = None) -> Prompts | Vectors:
    """Initialize the concepts; without `mask_features` they depend only on the seed.

    Args:
        text: frozen text tower.
        config: settings.
        mask_features: [N, C], CLIP's features of masks, for `concept_init` data.

    Raises:
        ValueError: invalid class names, or fewer words than concepts.
    """
    if config.concept_kind == "names":
        return Vectors(classifier(text, names_of(config.concept_names), TEMPLATES[config.templates]), learn=False)
    generator = torch.Generator().manual_seed(config.seed)
    if config.concept_kind == "vectors":
        return Vectors(torch.randn(config.concepts, text.embed_dim, generator=generator), learn=True)
    learn, templates = config.concept_kind == "prompts", TEMPLATES[config.templates]
    if mask_features is None:
        words = torch.randint(0, text.vocabulary, (config.concepts, config.prompt_tokens), generator=generator)
    else:
        words = describing_words(text, mask_features, config.concepts, templates)[:, None].expand(-1, config.prompt_tokens)
    return Prompts(text, words, learn, templates)


@torch.no_grad()
def describing_words(text: TextTower, mask_features: Tensor, count: int, templates: tuple[str, ...]) -> Tensor:
    """Choose the words that together describe masks best.

    Every word is scored by the cosine of its prompt with each mask, both minus their means over all words and masks, because
    the means, which CLIP's modality gap determines, say nothing about the content. Words are chosen greedily: the next one
    raises the mean over masks of the best score (at least 0, that of an average mask) most. Redundant words therefore come
    last (facility location; the greedy choice reaches at least 63 % of the optimum, Nemhauser et al. 1978).

    Args:
        text: text tower.
        mask_features: [N, C] of unit length.
        count: number of words.
        templates: texts with one `{}` for the word.

    Returns:
        [count], token ids, in the order of choice.

    Raises:
        ValueError: the vocabulary has fewer distinct whole words.
    """
    words = torch.tensor(text.whole_words())
    if len(words) < count:
        raise ValueError(f"train.concepts {count}: concept_init data finds only {len(words)} distinct words in the vocabulary")
    chunks = words[:, None].split(_WORDS_AT_ONCE)
    prompts = torch.cat([Prompts(text, chunk, False, templates)(text) for chunk in chunks])
    prompts = F.normalize(prompts, dim=-1).cpu()
    mask_features = mask_features[:: -(-len(mask_features) // _MAX_MASKS)].cpu()
    scores = (mask_features - mask_features.mean(dim=0)) @ (prompts - prompts.mean(dim=0)).T  # [N, W]
    chosen: list[int] = []
    best = scores.new_zeros(len(scores), 1)
    for _ in range(count):
        mean_best = torch.maximum(scores, best).mean(dim=0)
        mean_best[chosen] = -torch.inf
        chosen.append(int(mean_best.argmax()))
        best = torch.maximum(best, scores[:, chosen[-1:]])
    return words[chosen]
