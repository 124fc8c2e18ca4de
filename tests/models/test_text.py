"""Classifier and prompts against open_clip's text tower."""

from importlib import resources

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import tiny
from pixelclip.models.checkpoint import Clip, load_clip
from pixelclip.models.text import TEMPLATES, Prompts, TextTower, classifier

TOKENIZER = open_clip.SimpleTokenizer()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> open_clip.CLIP:
    return load_clip(str(tiny.clip_folder(tmp_path_factory.mktemp("clip")))).model


@pytest.fixture(scope="module")
def tower(clip) -> TextTower:
    return TextTower(clip)


@torch.no_grad()
def encode_text(clip: open_clip.CLIP, text: str) -> Tensor:
    """Encode one text with open_clip, without batching, at all 77 positions."""
    return clip.encode_text(TOKENIZER([text]))[0]


def test_classifier_equals_a_loop_over_classes_templates_and_synonyms(clip, tower):
    expected = []
    for words in (["dog", "puppy", "hot dog"], ["grass"], ["sky"]):
        per_template = []
        for template in TEMPLATES["ensemble"]:
            units = [encode_text(clip, template.format(word)) for word in words]
            mean = sum(unit / unit.norm() for unit in units) / len(words)
            per_template.append(mean / mean.norm())
        mean = sum(per_template) / len(per_template)
        expected.append(mean / mean.norm())
    actual = classifier(tower, ["dog, puppy,hot dog", "grass", " sky "])
    torch.testing.assert_close(actual, torch.stack(expected), atol=1e-5, rtol=0)


def test_class_embedding_does_not_depend_on_the_batch(tower):
    many = [f"thing {i}" for i in range(60)]  # more texts than one batch
    torch.testing.assert_close(classifier(tower, many)[41:42], classifier(tower, ["thing 41"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", ["", "dog", "a {} 日本語 \n dog", "long words here " * 40])
def test_omitting_positions_after_the_end_is_exact(clip, tower, text):
    torch.testing.assert_close(tower.encode([text, "x"])[0], encode_text(clip, text), atol=1e-5, rtol=0)


def test_prompts_initialised_with_words_equal_encode_text(clip, tower):
    sentences = ["dog cat", "grass sky"]
    words = TOKENIZER(sentences)[:, 1:3]
    prompts = Prompts(tower, words)
    expected = [encode_text(clip, f"A photo of a {sentence} in the scene") for sentence in sentences]
    torch.testing.assert_close(prompts(tower), torch.stack(expected), atol=1e-5, rtol=0)


def test_prompts_learn_and_only_tokens_are_saved(clip, tower):
    prompts = Prompts(tower, torch.full((2, 4), 320))
    prompts(tower).sum().backward()
    assert prompts.tokens.grad.abs().amax(dim=-1).min() > 0  # every token of every concept
    assert list(prompts.state_dict()) == ["tokens"]
    before = clip.token_embedding.weight[320].clone()
    with torch.no_grad():
        prompts.tokens += 1
    assert torch.equal(clip.token_embedding.weight[320], before)


def test_prompt_tokens_beyond_the_context_length_are_rejected(tower):
    Prompts(tower, torch.zeros(2, 68, dtype=torch.long))  # with the 7 fixed words, start and end: 77
    with pytest.raises(ValueError, match="69 prompt tokens do not fit the context length 77"):
        Prompts(tower, torch.zeros(2, 69, dtype=torch.long))


def test_template_ensemble_of_prompts_equals_a_loop_over_templates(clip, tower):
    """Sentences of real words as learned tokens, encoded by open_clip one by one at all 77 positions."""
    sentences = ["dog cat", "grass sky"]
    prompts = Prompts(tower, TOKENIZER(sentences)[:, 1:3], templates=TEMPLATES["ensemble"])
    expected = []
    for sentence in sentences:
        units = [F.normalize(encode_text(clip, template.format(sentence)), dim=0) for template in TEMPLATES["ensemble"]]
        expected.append(F.normalize(sum(units) / len(units), dim=0))
    torch.testing.assert_close(prompts(tower), torch.stack(expected), atol=1e-5, rtol=0)


def test_every_token_learns_from_every_template(tower):
    words = torch.full((2, 4), 320)
    prompts = Prompts(tower, words, templates=TEMPLATES["ensemble"])
    prompts(tower)[:, 0].sum().backward()
    assert prompts.tokens.grad.abs().amax(dim=-1).min() > 0
    alone = []
    for template in TEMPLATES["ensemble"]:
        single = Prompts(tower, words, templates=(template,))
        alone.append(F.normalize(single(tower), dim=-1))
        alone[-1][:, 0].sum().backward()
        assert single.tokens.grad.abs().max() > 0, template
    assert len({tuple(features[0].tolist()) for features in alone}) == len(alone)  # no template stands for another


def test_longest_template_counts_for_the_context_length(tower):
    Prompts(tower, torch.zeros(2, 68, dtype=torch.long), templates=TEMPLATES["ensemble"])
    with pytest.raises(ValueError, match="69 prompt tokens do not fit the context length 77"):
        Prompts(tower, torch.zeros(2, 69, dtype=torch.long), templates=TEMPLATES["ensemble"])


def test_class_name_that_the_tokenizer_would_cut_is_rejected(tower):
    template = max(TEMPLATES["ensemble"], key=lambda text: len(tower.tokenizer.encode(text)))
    room = 75 - len(tower.tokenizer.encode(template.replace("{}", "")))
    fits = " ".join(["word"] * room)
    classifier(tower, ["sky", fits])
    for name in (f"{fits} beyond", f"grass, {fits} beyond"):
        with pytest.raises(ValueError, match=r"class name 2 '.*word beyond' .*78 tokens.*reads 77.*cut after '.*word .*'$"):
            classifier(tower, ["sky", name])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Sky", "sky"),
        ("caf\u00e9", "cafe\u0301"),
        ("traffic light", "traffic  light"),
        ("rock & roll", "rock &amp; roll"),
        ("a, b", "B, A"),
        ("dog", "dog, DOG"),
    ],
)
def test_class_names_that_are_equal_to_the_tokenizer_are_rejected(tower, first, second):
    with pytest.raises(ValueError, match=rf"class names 2 {first!r} and 3 {second!r} are the same to the tokenizer"):
        classifier(tower, ["tree", first, second])


def test_names_of_every_benchmark_differ_and_fit(tower):
    folder = resources.files("pixelclip").joinpath("assets/classes")
    for file in [file for names in folder.iterdir() for file in names.iterdir()]:
        names = file.read_text().splitlines()
        assert len(classifier(tower, names, TEMPLATES["single"])) == len(names)


def test_unsupported_text_towers_are_rejected():
    with pytest.raises(ValueError, match="Linear is not supported"):
        TextTower(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("names", [[], ["dog", " , "], ["dog", " dog"]])
def test_classifier_rejects_unusable_class_names(tower, names):
    with pytest.raises(ValueError, match="class name"):
        classifier(tower, names)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> Clip:
    return load_clip(str(tiny.clip_folder(tmp_path_factory.mktemp("siglip"), kind="siglip")))


def test_siglips_texts_are_encoded_at_all_positions_and_pooled_at_the_last(siglip):
    texts = ["A photo of a dog in the scene!", "", "dog " * 80]
    tokens = siglip.tokenizer(texts)
    assert tokens.shape == (3, 64) and (tokens[:, -1] == 1).all()
    expected = siglip.model.encode_text(tokens)
    torch.testing.assert_close(siglip.text_tower().encode(texts), expected, atol=1e-5, rtol=0)


def test_siglips_prompts_equal_the_sentence_of_the_same_words(siglip):
    """Every position matters, so the padding after the prompt does, too."""
    tower, text = siglip.text_tower(), "a photo of a the photo in the scene"
    tokens = siglip.tokenizer([text, "the photo"])
    prompts = Prompts(tower, tokens[1:, :2])
    torch.testing.assert_close(prompts(tower), siglip.model.encode_text(tokens[:1]), atol=1e-5, rtol=0)
    prompts(tower).sum().backward()
    assert prompts.tokens.grad.abs().amax(dim=-1).min() > 0
    with pytest.raises(ValueError, match="57 prompt tokens do not fit the context length 64"):
        Prompts(tower, torch.zeros(1, 57, dtype=torch.long))  # with the 7 fixed words and the end: 65
    Prompts(tower, torch.zeros(1, 56, dtype=torch.long))


def test_text_tower_without_causal_attention_is_not_truncated():
    """MobileCLIP2-L-14: CLIP's tokenizer, pooled at the end-of-text token, attention to all positions."""
    clip = open_clip.CustomTextCLIP(**tiny.CLIP_CONFIG | {"text_cfg": {**tiny.CLIP_CONFIG["text_cfg"], "no_causal_mask": True}})
    with torch.no_grad():
        for parameter in clip.text.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    tower, text = TextTower(clip), "A photo of a dog cat in the scene"
    expected = encode_text(clip, text)
    torch.testing.assert_close(tower.encode([text])[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(Prompts(tower, TOKENIZER(["dog cat"])[:, 1:3])(tower)[0], expected, atol=1e-5, rtol=0)


def test_other_tokenizers_are_not_replaced_by_clips(siglip):
    with pytest.raises(ValueError, match="this text tower needs its own tokenizer: it has 64 tokens"):
        TextTower(siglip.model)
