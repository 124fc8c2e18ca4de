"""CLIP's text tower, classifiers from class names, learnable prompts (PixelCLIP, section 3.2).

B images, K concepts, L prompt tokens per concept, C embedding width, T text positions, D text width.
"""

from collections.abc import Sequence
from functools import cache

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelclip.data.class_names import check_names
from pixelclip.models.attention import run_block

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
_PLACEHOLDER = 39025  # BPE token of "{}"


@cache
def _tokenizer(context_length: int) -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=context_length)  # reads its vocabulary of 49,408 tokens anew


class TextTower(nn.Module):
    """CLIP's text tower, called with token embeddings; shares the modules of open_clip's model.

    Args:
        clip: an open_clip `CLIP` with causal attention, pooled at the end-of-text token.

    Raises:
        ValueError: the text tower is not supported.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        if not isinstance(clip, open_clip.CLIP) or getattr(clip, "text_pool_type", "argmax") != "argmax":
            raise ValueError(
                f"the text tower of {type(clip).__name__} is not supported: "
                "it must be an open_clip CLIP with causal attention, pooled at the end-of-text token"
            )
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.transformer = clip.transformer
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        self.attn_mask: Tensor | None
        self.register_buffer("attn_mask", clip.attn_mask, persistent=False)
        self.tokenizer = _tokenizer(int(clip.context_length))

    @property
    def width(self) -> int:
        """Width of a token embedding (D)."""
        return int(self.token_embedding.weight.shape[1])

    @property
    def embed_dim(self) -> int:
        """Width of a text feature (C)."""
        projection = self.text_projection
        return int(projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1])

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return token ids [N, T] of the texts, truncated to the context length."""
        return self.tokenizer(list(texts)).to(self.token_embedding.weight.device)

    def forward(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Encode token embeddings.

        Attention is causal, so positions after `end`, where the output is taken, may be omitted.

        Args:
            embeddings: [N, T, D], T at most the context length.
            end: [N], position of the end-of-text token of each row.

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

    def encode(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Return the features [N, C] of texts, not normalised."""
        features = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenize(texts[start : start + batch_size])
            end = tokens.argmax(dim=-1)  # the end-of-text token has the highest id
            features.append(self(self.token_embedding(tokens[:, : int(end.max()) + 1]), end))
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


def _check_tokens(tower: TextTower, names: Sequence[str], synonyms: Sequence[Sequence[str]], templates: Sequence[str]) -> None:
    """Raise ValueError for a name that the tokenizer would cut, or that equals another one after its normalisation."""
    tokenizer = tower.tokenizer
    longest = max(templates, key=lambda template: len(tokenizer.encode(template)))
    positions: dict[frozenset[tuple[int, ...]], int] = {}
    for position, (name, words) in enumerate(zip(names, synonyms, strict=True)):
        for word in words:
            tokens = tokenizer.encode(longest.replace("{}", word))
            limit = tokenizer.context_length - 2  # besides the tokens for start and end
            if len(tokens) > limit:
                raise ValueError(
                    f"class name {position + 1} {name!r} is too long: {len(tokens) + 2} tokens in the template {longest!r}, "
                    f"and this CLIP reads {limit + 2}; it would be cut after {tokenizer.decode(tokens[:limit]).strip()[-30:]!r}"
                )
        same = positions.setdefault(frozenset(tuple(tokenizer.encode(word)) for word in words), position)
        if same != position:
            raise ValueError(
                f"class names {same + 1} {names[same]!r} and {position + 1} {name!r} are the same to the tokenizer, which "
                "ignores case, repeated blanks and the encoding of accents"
            )


class Prompts(nn.Module):
    """K learnable concepts: "A photo of a {t1..tL} in the scene" with learnable t1..tL.

    Args:
        tower: text tower, which embeds the fixed words and is not stored.
        words: [K, L], token ids whose embeddings initialise the learnable tokens.
        learn: whether the tokens are learnable.
    """

    def __init__(self, tower: TextTower, words: Tensor, learn: bool = True) -> None:
        super().__init__()
        length = words.shape[1]
        text = PROMPT_TEMPLATE.replace("{}", " ".join(["{}"] * length))
        tokens = tower.tokenize([text])[0]
        slots = (tokens == _PLACEHOLDER).nonzero()[:, 0]
        end = int(tokens.argmax())
        if len(slots) != length or end != len(tower.tokenizer.encode(text)) + 1:  # the tokenizer truncates silently
            raise ValueError(f"{length} prompt tokens do not fit the context length {len(tokens)} of this CLIP")
        with torch.no_grad():
            fixed = tower.token_embedding(tokens[: end + 1]).clone()  # [T, D]
            start = tower.token_embedding(words.to(tokens.device)).clone()  # [K, L, D]
        self.tokens = nn.Parameter(start, requires_grad=learn)
        # Not in the state dict, because both follow from the CLIP.
        self.fixed: Tensor
        self.slots: Tensor
        self.register_buffer("fixed", fixed, persistent=False)
        self.register_buffer("slots", slots, persistent=False)

    def forward(self, tower: TextTower) -> Tensor:
        """Return the concepts [K, C], not normalised."""
        count = self.tokens.shape[0]
        embeddings = self.fixed.expand(count, -1, -1).index_copy(1, self.slots, self.tokens)  # [K, T, D]
        return tower(embeddings, torch.full((count,), embeddings.shape[1] - 1, device=embeddings.device))


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
