"""Concepts chosen from data, against an exhaustive search and a literal greedy loop."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from helpers import tiny
from pixelclip.config import TrainConfig
from pixelclip.models.clustering import sample_concepts
from pixelclip.models.concepts import describing_words, new_concepts
from pixelclip.models.text import TEMPLATES, Prompts, TextTower


@pytest.fixture(scope="module")
def text() -> TextTower:
    return TextTower(tiny.clip_of())


@pytest.fixture
def few_words(text, monkeypatch) -> list[int]:
    words = text.whole_words()[1000:1012]
    monkeypatch.setattr(text, "whole_words", lambda: words)
    return words


def centred_scores(text, words, features):
    with torch.no_grad():
        prompts = F.normalize(torch.cat([Prompts(text, torch.tensor([[word]]))(text) for word in words]), dim=-1)
    return (features - features.mean(dim=0)) @ (prompts - prompts.mean(dim=0)).T


def mask_features(text, count=40):
    return F.normalize(torch.randn(count, text.embed_dim, generator=torch.Generator().manual_seed(3)), dim=-1)


def test_chosen_words_equal_a_literal_greedy_loop(text, few_words):
    features = mask_features(text)
    scores = centred_scores(text, few_words, features)
    expected: list[int] = []
    for _ in range(5):
        left = [word for word in range(len(few_words)) if word not in expected]
        expected.append(max(left, key=lambda word: scores[:, [*expected, word]].amax(dim=1).clamp_min(0).mean().item()))
    assert describing_words(text, features, 5, TEMPLATES["single"]).tolist() == [few_words[word] for word in expected]


def test_chosen_words_are_near_the_best_set(text, few_words):
    features = mask_features(text)
    scores = centred_scores(text, few_words, features)
    found = [few_words.index(word) for word in describing_words(text, features, 3, TEMPLATES["single"]).tolist()]
    values = {
        chosen: scores[:, chosen].amax(dim=1).clamp_min(0).mean().item() for chosen in combinations(range(len(few_words)), 3)
    }
    best, worst = max(values.values()), min(values.values())
    assert values[tuple(sorted(found))] > worst + 0.8 * (best - worst)


def test_too_few_words_are_an_error(text, few_words):
    with pytest.raises(ValueError, match=r"train\.concepts 13: concept_init data finds only 12 distinct words"):
        describing_words(text, mask_features(text), 13, TEMPLATES["single"])


def test_whole_words_are_distinct_words(text):
    words = text.whole_words()
    assert {"dog</w>", "cat</w>"} <= {text.tokenizer.decoder[word] for word in words}
    embeddings = text.token_embedding.weight[words]
    assert len(embeddings.unique(dim=0)) == len(words)


def test_every_token_of_a_prompt_starts_as_the_chosen_word(text, few_words):
    features = mask_features(text)
    config = TrainConfig(concepts=3, prompt_tokens=2, concept_init="data")
    words = describing_words(text, features, 3, TEMPLATES["single"])
    tokens = new_concepts(text, config, features).tokens
    torch.testing.assert_close(tokens, text.token_embedding(words)[:, None].expand(-1, 2, -1))


def test_sampled_concepts_contain_those_with_masks_and_are_unbiased():
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(3, 10, generator=generator) < 0.25
    values = torch.randn(3, 10, generator=generator)
    torch.manual_seed(1)
    total = torch.zeros(3)
    for _ in range(4000):
        chosen, weights = sample_concepts(present, 6)
        assert all(set(present[row].nonzero()[:, 0].tolist()) <= set(chosen[row].tolist()) for row in range(3))
        total += (values.gather(1, chosen) * weights).sum(dim=1)
    torch.testing.assert_close(total / 4000, values.sum(dim=1), atol=0.15, rtol=0)


def test_sampled_concepts_are_unbiased_if_more_have_masks():
    present = torch.ones(1, 8, dtype=torch.bool)
    chosen, weights = sample_concepts(present, 2)
    assert weights.tolist() == [[4.0, 4.0]]
    assert len(set(chosen[0].tolist())) == 2
