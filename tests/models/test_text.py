"""Classifier and prompts against open_clip's text tower."""

from importlib import resources

import open_clip
import pytest
import torch
from torch import Tensor

from helpers import tiny
from pixelclip.models.checkpoint import load_clip
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
    for file in folder.iterdir():
        names = file.read_text().splitlines()
        assert len(classifier(tower, names, TEMPLATES["single"])) == len(names)


def test_unsupported_text_towers_are_rejected():
    with pytest.raises(ValueError, match="Linear is not supported"):
        TextTower(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("names", [[], ["dog", " , "], ["dog", " dog"]])
def test_classifier_rejects_unusable_class_names(tower, names):
    with pytest.raises(ValueError, match="class name"):
        classifier(tower, names)
