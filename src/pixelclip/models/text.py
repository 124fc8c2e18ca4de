"""CLIP's text tower, classifiers from class names, learnable prompts (PixelCLIP, section 3.2).

B images, K concepts, L prompt tokens per concept, C embedding width, T text positions, D text width.
"""

from collections.abc import Sequence
from copy import copy
from functools import cache
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from pixelclip.data.class_names import check_names
from pixelclip.models.attention import run_block
from pixelclip.models.tokenizer import FileTokenizer

PROMPT_TEMPLATE = "A photo of a {} in the scene"
TEMPLATES: dict[str, tuple[str, ...]] = {
    "ensemble": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
        PROMPT_TEMPLATE,
    ),
    "single": (PROMPT_TEMPLATE,),
}
_WORDS = ("dog", "cat")
"""Words of one token in the supported tokenizers. Where they change the tokens of a template, the learnable ones stand."""
_VOCABULARY = 49408  # of CLIP's own tokenizer


@cache
def _tokenizer(context_length: int) -> open_clip.SimpleTokenizer:
    built = getattr(open_clip.tokenizer, "_tokenizer", None)  # by the import; another one reads the 49,408 tokens anew
    if not isinstance(built, open_clip.SimpleTokenizer):
        return open_clip.SimpleTokenizer(context_length=context_length)
    tokenizer = copy(built)
    tokenizer.context_length = context_length
    return tokenizer


def _whole_words(tokenizer: open_clip.SimpleTokenizer) -> list[int]:
    end = "</w>"  # of CLIP's tokens that end a word
    tokens = sorted(tokenizer.decoder.items())
    return [index for index, token in tokens if token.endswith(end) and token.removesuffix(end).isalpha()]


class TextTower(nn.Module):
    """CLIP's text tower, called with token embeddings; shares the modules of open_clip's model.

    Args:
        clip: an open_clip `CLIP` or `CustomTextCLIP` whose transformer is open_clip's, pooled at the end-of-text token (CLIP)
            or the last position (SigLIP).
        tokenizer: None is CLIP's own.

    Raises:
        ValueError: the text tower is not supported, or needs another tokenizer.
    """

    def __init__(self, clip: nn.Module, tokenizer: FileTokenizer | None = None) -> None:
        super().__init__()
        text: Any = getattr(clip, "text", clip)  # open_clip's CLIP contains the parts of its text tower
        self.pool = getattr(text, "text_pool_type", getattr(text, "pool_type", "argmax"))
        known = isinstance(clip, open_clip.CLIP) or isinstance(text, TextTransformer)
        if not known or self.pool not in ("argmax", "last") or getattr(text, "cls_emb", None) is not None:
            raise ValueError(
                f"the text tower of {type(clip).__name__} is not supported: it must be open_clip's own transformer, "
                "pooled at the end-of-text token (CLIP, EVA-CLIP, MobileCLIP) or the last position (SigLIP, SigLIP2)"
            )
        if text.text_projection is None:
            raise ValueError("this text tower is not supported: it has no projection")
        if tokenizer is None and (count := len(text.token_embedding.weight)) != _VOCABULARY:
            raise ValueError(f"this text tower needs its own tokenizer: it has {count} tokens, CLIP's {_VOCABULARY}")
        self.token_embedding = text.token_embedding
        self.positional_embedding = text.positional_embedding
        self.transformer = text.transformer
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection
        self.attn_mask: Tensor | None
        self.register_buffer("attn_mask", text.attn_mask, persistent=False)
        self.tokenizer = tokenizer or _tokenizer(len(text.positional_embedding))
        # Only then do later positions not change the output.
        self.truncates = self.pool == "argmax" and text.attn_mask is not None

    @property
    def width(self) -> int:
        """Width of a token embedding (D)."""
        return int(self.token_embedding.weight.shape[1])

    @property
    def embed_dim(self) -> int:
        """Width of a text feature (C)."""
        projection = self.text_projection
        return int(projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1])

    @property
    def room(self) -> int:
        """Number of tokens, as `tokenizer.encode` returns them, that fit the context length."""
        return self.tokenizer.context_length - (0 if isinstance(self.tokenizer, FileTokenizer) else 2)  # start and end

    @property
    def vocabulary(self) -> int:
        """Number of tokens that are parts of words; their ids start at 0."""
        if isinstance(self.tokenizer, FileTokenizer):
            return len(self.token_embedding.weight)
        return int(self.tokenizer.sot_token_id)

    def whole_words(self) -> list[int]:
        """Return the ids of tokens that are a whole word of letters; of tokens with equal embeddings only the first."""
        words = self.tokenizer.whole_words() if isinstance(self.tokenizer, FileTokenizer) else _whole_words(self.tokenizer)
        embeddings = self.token_embedding.weight.detach().cpu()
        distinct: dict[bytes, int] = {}
        for index in words:
            distinct.setdefault(embeddings[index].numpy().tobytes(), index)
        return list(distinct.values())

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return token ids [N, T] of the texts, truncated to the context length."""
        return self.tokenizer(list(texts)).to(self.token_embedding.weight.device)

    def end(self, tokens: Tensor) -> Tensor:
        """Return the position [N] at which the output of tokens [N, T] is taken."""
        if self.pool == "last":
            return torch.full_like(tokens[:, 0], tokens.shape[1] - 1)
        return tokens.argmax(dim=-1)  # the end-of-text token has the highest id

    def forward(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Encode token embeddings.

        If `truncates`, attention is causal, and positions after `end` may be omitted; else T must be the context length.

        Args:
            embeddings: [N, T, D].
            end: [N], position at which the output of each row is taken.

        Returns:
            [N, C], not normalised.
        """
        length = embeddings.shape[1]
        x = embeddings + self.positional_embedding[:length]
        mask = self.attn_mask
        mask = None if mask is None else mask[:length, :length]
        for block in self.transformer.resblocks:
            x = run_block(block, x, mask)
        x = self.ln_final(x[torch.arange(len(x), device=x.device), end])
        projection = self.text_projection
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection

    def length(self, end: Tensor) -> int:
        """Return the number of positions that determine the outputs at `end` [N]."""
        return int(end.max()) + 1 if self.truncates else len(self.positional_embedding)

    def encode(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Return the features [N, C] of texts, not normalised."""
        features = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenize(texts[start : start + batch_size])
            end = self.end(tokens)
            features.append(self(self.token_embedding(tokens[:, : self.length(end)]), end))
        return torch.cat(features)


@torch.no_grad()
def classifier(tower: TextTower, names: Sequence[str], templates: Sequence[str] = TEMPLATES["ensemble"]) -> Tensor:
    """Compute a classifier from class names.

    A name "a, b" lists synonyms. Their unit features are averaged and normalised per template; then the mean over templates is
    normalised.

    Args:
        tower: the frozen text tower.
        names: K class names.
        templates: texts with one `{}` for the name.

    Returns:
        [K, C] of unit length.

    Raises:
        ValueError: as `check_names`, two names have the same tokens, or a name does not fit the context length.
    """
    names = check_names(names)
    synonyms = [[word.strip() for word in name.split(",") if word.strip()] for name in names]
    _check_tokens(tower, names, synonyms, templates)
    texts = [template.replace("{}", word) for words in synonyms for word in words for template in templates]
    features = F.normalize(tower.encode(texts), dim=-1).unflatten(0, (-1, len(templates)))  # [words, templates, C]
    per_class = torch.stack([words.mean(dim=0) for words in features.split([len(words) for words in synonyms])])
    return F.normalize(F.normalize(per_class, dim=-1).mean(dim=1), dim=-1)


@torch.no_grad()
def nearest_names(concepts: Tensor, classes: Tensor, names: Sequence[str], count: int) -> list[list[tuple[str, float]]]:
    """Return the `count` nearest names of every concept with their cosines.

    Args:
        concepts: [K, C], of any length.
        classes: [N, C], see `classifier`.
        names: N names.
        count: at most N are returned.
    """
    top = (F.normalize(concepts, dim=-1) @ classes.T).topk(min(count, len(names)), dim=-1)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[(names[i], round(value, 4)) for i, value in zip(*row, strict=True)] for row in pairs]


def _check_tokens(tower: TextTower, names: Sequence[str], synonyms: Sequence[Sequence[str]], templates: Sequence[str]) -> None:
    """Raise ValueError for a name that the tokenizer would cut, or that equals another one after its normalisation."""
    tokenizer = tower.tokenizer
    longest = max(templates, key=lambda template: len(tokenizer.encode(template)))
    positions: dict[frozenset[tuple[int, ...]], int] = {}
    for position, (name, words) in enumerate(zip(names, synonyms, strict=True)):
        for word in words:
            tokens = tokenizer.encode(longest.replace("{}", word))
            if (excess := len(tokens) - tower.room) > 0:
                kept, limit = tokenizer.decode(tokens[: tower.room]), tokenizer.context_length
                raise ValueError(
                    f"class name {position + 1} {name!r} is too long: {limit + excess} tokens in the template {longest!r}, "
                    f"and this CLIP reads {limit}; it would be cut after {kept.strip()[-30:]!r}"
                )
        same = positions.setdefault(frozenset(tuple(tokenizer.encode(word)) for word in words), position)
        if same != position:
            raise ValueError(
                f"class names {same + 1} {names[same]!r} and {position + 1} {name!r} are the same to the tokenizer"
            )


class Prompts(nn.Module):
    """K learnable concepts: "A photo of a {t1..tL} in the scene" with learnable t1..tL, or the mean over several templates.

    Args:
        tower: text tower, which embeds the fixed words and is not stored.
        words: [K, L], token ids whose embeddings initialise the learnable tokens.
        learn: whether the tokens are learnable.
        templates: texts with one `{}` for the learnable tokens.

    Raises:
        ValueError: the longest text does not fit the context length.
    """

    def __init__(
        self, tower: TextTower, words: Tensor, learn: bool = True, templates: Sequence[str] = TEMPLATES["single"]
    ) -> None:
        super().__init__()
        length = words.shape[1]
        words_of_templates = [[template.replace("{}", " ".join([word] * length)) for template in templates] for word in _WORDS]
        tokens, others = (tower.tokenize(texts) for texts in words_of_templates)  # [M, T], M templates
        learnable = tokens != others
        too_long = any(len(tower.tokenizer.encode(text)) > tower.room for text in words_of_templates[0])
        if not too_long and (learnable.sum(dim=1) != length).any():
            raise ValueError(f"this tokenizer is not supported: {' or '.join(map(repr, _WORDS))} is not one token")
        if too_long:
            raise ValueError(f"{length} prompt tokens do not fit the context length {tokens.shape[1]} of this CLIP")
        ends = tower.end(tokens)
        with torch.no_grad():
            fixed = tower.token_embedding(tokens[:, : tower.length(ends)]).clone()  # [M, T, D]
            start = tower.token_embedding(words.to(tokens.device)).clone()  # [K, L, D]
        self.tokens = nn.Parameter(start, requires_grad=learn)
        # Not in the state dict, because all follow from the CLIP and the templates.
        self.fixed: Tensor
        self.slots: Tensor
        self.ends: Tensor
        self.register_buffer("fixed", fixed, persistent=False)
        self.register_buffer("slots", learnable.nonzero()[:, 1].view(len(tokens), length), persistent=False)
        self.register_buffer("ends", ends, persistent=False)

    def forward(self, tower: TextTower) -> Tensor:
        """Return the concepts [K, C]: not normalised for one template, otherwise of unit length.

        Several templates are averaged like those of `classifier`: the unit features' mean, normalised.
        """
        count, num_templates = len(self.tokens), len(self.fixed)
        fixed = self.fixed[:, None].expand(-1, count, -1, -1)  # [M, K, T, D]
        tokens = self.tokens.expand(num_templates, -1, -1, -1)  # [M, K, L, D]
        embeddings = fixed.scatter(2, self.slots[:, None, :, None].expand_as(tokens), tokens)
        features = tower(embeddings.flatten(0, 1), self.ends.repeat_interleave(count)).unflatten(0, (num_templates, count))
        if num_templates == 1:
            return features[0]
        return F.normalize(F.normalize(features, dim=-1).mean(dim=0), dim=-1)


class Vectors(nn.Module):
    """K concepts as plain vectors, without the text tower (an ablation, or the features of fixed names).

    Args:
        values: [K, C].
        learn: whether the vectors are learnable.
    """

    def __init__(self, values: Tensor, learn: bool) -> None:
        super().__init__()
        self.values = nn.Parameter(values.detach().clone(), requires_grad=learn)

    def forward(self, tower: TextTower) -> Tensor:
        """Return the concepts [K, C], not normalised; `tower` is unused."""
        return self.values
