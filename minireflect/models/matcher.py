"""Does this sentence hold for this picture?  A small matching head on CLIP's two towers.

CLIP compares one vector with one vector, and a global similarity does not know which fact matters: under reinforcement
such a reward rose while the truth fell.  Here every word of the caption looks at the patches of the picture and says
for itself whether the sentence up to it holds; the sentence holds as far as its weakest word:

    logit = -log sum_i exp(-logit_i)          over the words i, the end of the sentence included

In CLIP's place after Radford et al. 2021; the head is close to the image-text matching of ALBEF (Li et al. 2021).
Shapes: b batch, t tokens, n patches, d width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Attention
from .clip import CLIP, CLIPConfig, TextConfig, VisionConfig


@dataclass(frozen=True)
class MatcherConfig:
    vocabulary: int  # number of token ids
    eos: int  # id of the end-of-text token
    length: int  # longest sentence, in tokens
    width: int = 96  # of both towers and the head
    layers: int = 3  # transformer blocks of each tower
    heads: int = 4
    depth: int = 2  # cross-attention blocks of the head
    size: int = 64  # side of the pictures in pixels
    patch: int = 8  # side of a patch in pixels

    @property
    def clip(self) -> CLIPConfig:
        text = TextConfig(self.vocabulary, self.eos, self.length, self.width, self.layers, self.heads)
        vision = VisionConfig(self.size, self.patch, self.width, self.layers, self.heads)
        return CLIPConfig(text, vision, self.width)


class CrossBlock(nn.Module):
    """The words look at the picture, then think."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, context_width=width, bias=True)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        """Shapes: x (b t d), patches (b n d) -> (b t d)"""
        x = x + self.attn(self.norm1(x), patches)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Matcher(nn.Module):
    """CLIP, and on top of its towers a head that reads the caption against the patches."""

    def __init__(self, config: MatcherConfig) -> None:
        super().__init__()
        self.config = config
        self.clip = CLIP(config.clip)
        self.norm_patches = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(CrossBlock(config.width, config.heads) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width)
        self.verdict = nn.Linear(config.width, 1)

    def words(self, patches: Tensor, hidden: Tensor) -> Tensor:
        """One logit a token: does the sentence hold up to here?  Shapes: patches (b n d), hidden (b t d) -> (b t)"""
        x, patches = hidden, self.norm_patches(patches)
        for block in self.blocks:
            x = block(x, patches)  # (b t d)
        return self.verdict(self.norm_out(x))[..., 0]  # (b t)

    def judge(self, patches: Tensor, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logit that the whole sentence holds.  Shapes: patches (b n d), hidden (b t d), ids (b t) -> (b)"""
        first = (ids == self.config.eos).int().argmax(dim=1, keepdim=True)  # (b 1) end of the sentence
        padding = torch.arange(ids.shape[1], device=ids.device) > first  # (b t)
        return -torch.logsumexp((-self.words(patches, hidden)).masked_fill(padding, float("-inf")), dim=1)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Shapes: images (b 3 h w), ids (b t) -> (b) logits"""
        return self.judge(self.clip.vision(images), self.clip.text(ids), ids)
