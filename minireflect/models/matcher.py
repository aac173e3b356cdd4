"""Does this sentence hold for this picture?  A small matching head on CLIP's two towers.

CLIP compares one vector with one vector, and a global similarity misses single facts: as a reward of
reinforcement learning it rose while the accuracy fell.  Here every word, with the words before it in context,
attends to the patches of the picture; the state at the end of the sentence gives the verdict.

The same states also predict the next word.  Captioning teaches every fact of every picture, where a yes or no
teaches one bit; this makes the verdict learnable from few pictures.

The towers are CLIP's (Radford et al. 2021); the head is close to the image-text matching of ALBEF (Li et al.
2021), the captioning to CoCa (Yu et al. 2022).
Shapes: b batch, t tokens, n patches, d width, v vocabulary.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Attention
from .clip import TextConfig, TextEncoder, VisionConfig, VisionEncoder, stem_patch


@dataclass(frozen=True)
class MatcherConfig:
    vocabulary: int  # number of token ids
    eos: int  # id of the end-of-text token
    length: int  # longest sentence, in tokens
    width: int = 96  # of both towers and the head
    layers: int = 3  # transformer blocks of the text tower
    vision_layers: int = 1  # transformer blocks of the image tower, after its convolutional stem
    heads: int = 4
    depth: int = 2  # cross-attention blocks of the head
    size: int = 64  # side of the pictures in pixels
    stem: tuple[int, ...] = (32, 64)  # channels of the stem; its three halvings make patches of 8 pixels
    fused: bool = False  # each block of the head begins with attention between words, as in ALBEF
    # std of token and position embeddings at the start; with CLIP's 0.02 positions are learnt slowly
    init_std: float = 0.02

    @property
    def text(self) -> TextConfig:
        sizes = (self.vocabulary, self.eos, self.length, self.width, self.layers, self.heads)
        return TextConfig(*sizes, init_std=self.init_std)

    @property
    def vision(self) -> VisionConfig:
        sizes = (self.size, stem_patch(self.stem), self.width, self.vision_layers, self.heads)
        return VisionConfig(*sizes, stem=self.stem, init_std=self.init_std)


class CrossBlock(nn.Module):
    """Attention between words, if `fused`, attention to the picture, a feed-forward layer.

    Without the first, words do not share what they saw: enough for one fact, slow to learn for relations.
    """

    def __init__(self, width: int, heads: int, fused: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if fused:
            self.norm0, self.own = nn.LayerNorm(width), Attention(width, heads, bias=True)
        self.fused = fused
        self.attn = Attention(width, heads, context_width=width, bias=True)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        """b/p consecutive sentences attend to each of p pictures, whose keys and values are made once.

        Shapes: x (b t d), patches (p n d) -> (b t d)
        """
        if self.fused:
            x = x + self.own(self.norm0(x), causal=True)
        t = x.shape[1] * (len(x) // max(1, len(patches)))  # words that attend to one picture
        queries = self.norm1(x).view(len(patches), t, x.shape[2])  # (p b/p*t d)
        x = x + self.attn(queries, patches).view_as(x)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Matcher(nn.Module):
    """The two encoders of CLIP, and a head that compares the caption with the patches."""

    def __init__(self, config: MatcherConfig) -> None:
        super().__init__()
        self.config = config
        self.text, self.vision = TextEncoder(config.text), VisionEncoder(config.vision)
        self.norm_patches = nn.LayerNorm(config.width)
        sizes = config.width, config.heads, config.fused
        self.blocks = nn.ModuleList(CrossBlock(*sizes) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width)
        self.verdict = nn.Linear(config.width, 1)
        self.next_word = nn.Linear(config.width, config.vocabulary)

    def attend(self, patches: Tensor, hidden: Tensor) -> Tensor:
        """The states of the words after attention to the picture, b/p sentences to a picture.

        Shapes: patches (p n d), hidden (b t d) -> (b t d)
        """
        x, patches = hidden, self.norm_patches(patches)
        for block in self.blocks:
            x = block(x, patches)  # (b t d)
        return self.norm_out(x)

    def match(self, patches: Tensor, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logit that the sentence holds, b/p sentences to a picture.

        Shapes: patches (p n d), hidden (b t d), ids (b t) -> (b)
        """
        return self.verdict(self.text.pooled(self.attend(patches, hidden), ids))[:, 0]

    def describe(self, patches: Tensor, hidden: Tensor) -> Tensor:
        """Logits of the next word after each.  Shapes: patches (b n d), hidden (b t d) -> (b t v)"""
        return self.next_word(self.attend(patches, hidden))

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Shapes: images (b 3 h w), ids (b t) -> (b) logits"""
        return self.match(self.vision(images), self.text(ids), ids)
