"""Networks that compare a picture with a sentence: CLIP, toy or real size, and the matcher of the toy world.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2

    text:     tokens + positions -> causal transformer -> one state per token
    vision:   class token, patches + positions -> transformer -> one state per token

    CLIP:     cosine of (state at the end-of-text token) and (state of the class token), both projected
    Matcher:  the states of the words attend to the patches; a linear layer turns the state at the
              end-of-text token into the logit that the sentence holds

The text encoder alone also encodes the prompts of Stable Diffusion.

CLIP compresses picture and sentence to one vector each, which loses details: when its cosine was used as the
reward in reinforcement learning, the reward rose while the accuracy fell.  In the matcher, the state of each
word attends to all patches.  The same states also predict the next word.  This captioning loss supervises
every fact in a picture, while a yes-or-no label carries one bit; with it the matcher learns from few
pictures.  The matcher's head is similar to image-text matching in ALBEF (Li et al. 2021), and captioning to
CoCa (Yu et al. 2022).

Shapes: b batch, t tokens, d width, n patches, e width of the joint space, v vocabulary, h w space.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..ranges import Checked, Depth, Natural, Positive, Size
from .blocks import Attention, Downsample, ResBlock, require_multiple

# OpenAI's mean m and std s are for pictures in [0, 1].  Our pictures are in [-1, 1]: 2m - 1 and 2s.
OPENAI_MEAN = tuple(2 * m - 1 for m in (0.48145466, 0.4578275, 0.40821073))
OPENAI_STD = tuple(2 * s for s in (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class TextConfig(Checked):
    """The defaults are those of CLIP-L, the text encoder of SD 1.x."""

    vocabulary: Size  # number of token ids
    eos: Natural  # id of the end-of-text token
    length: Size = 77  # longest sequence, in tokens
    width: Size = 768
    layers: Depth = 12
    heads: Size = 12
    quick_gelu: bool = True  # OpenAI's x * sigmoid(1.702 x); False = the exact GELU of OpenCLIP
    penultimate: bool = False  # forward returns the states before the last block, unnormalised (SDXL)
    hidden: Size | None = None  # width inside the feed-forward layers; None = 4 times the width
    projection: Size | None = None  # width of a projection of the pooled state (SDXL's second encoder)
    # std of the initial token embeddings, as in CLIP; position embeddings have half of it
    init_std: Positive = 0.02


def stem_patch(stem: tuple[int, ...]) -> int:
    """Side in pixels of a convolutional stem's patches: n entries halve the resolution n + 1 times."""
    return 2 ** (len(stem) + 1)


@dataclass(frozen=True)
class VisionConfig(Checked):
    """The defaults are those of CLIP ViT-L/14, which also has OPENAI_MEAN and OPENAI_STD."""

    size: Size = 224  # side of the pictures, in pixels
    patch: Size = 14  # side of a patch, in pixels
    width: Size = 1024
    layers: Depth = 24
    heads: Size = 16
    quick_gelu: bool = True
    hidden: Size | None = None  # width inside the feed-forward layers; None = 4 times the width
    # channels of a convolutional stem, which replaces CLIP's linear patch embedding; empty = none.  n entries
    # halve the resolution n + 1 times
    stem: tuple[Size, ...] = ()
    # mean and std by which pictures in [-1, 1] are normalised, per colour channel
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[Positive, Positive, Positive] = (1.0, 1.0, 1.0)
    init_std: Positive = 0.02  # std of the initial position embeddings, as in CLIP

    def require(self) -> None:
        require_multiple("size", self.size, "patch", self.patch)
        if self.stem and (made := stem_patch(self.stem)) != self.patch:
            raise ValueError(f"a stem {self.stem} makes patches of {made} pixels, not of {self.patch}")


@dataclass(frozen=True)
class CLIPConfig(Checked):
    text: TextConfig  # with projection=None: CLIP itself projects the pooled state
    vision: VisionConfig
    width: Size = 768  # e, width of the joint space


class Block(nn.Module):
    """A pre-norm transformer block: self-attention, then a feed-forward layer, both residual."""

    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        self.quick_gelu, d = config.quick_gelu, config.width
        hidden = config.hidden or 4 * d
        self.norm1, self.attn = nn.LayerNorm(d), Attention(d, config.heads, bias=True)
        self.norm2 = nn.LayerNorm(d)
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """Shapes: x (b t d) -> (b t d)"""
        x = x + self.attn(self.norm1(x), causal=causal)
        y = self.fc1(self.norm2(x))  # (b t hidden)
        y = y * torch.sigmoid(1.702 * y) if self.quick_gelu else F.gelu(y)
        return x + self.fc2(y)  # (b t d)


class TextStates(NamedTuple):
    read: Tensor  # (b t d) the states that condition a diffusion model
    last: Tensor  # (b t d) the states after the last block, normalised


class TextEncoder(nn.Module):
    """Encodes a sentence as one hidden state per token; a token attends to itself and earlier tokens."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.token, self.position = nn.Embedding(config.vocabulary, d), nn.Embedding(config.length, d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(d)
        if config.projection is not None:
            self.text_projection = nn.Linear(d, config.projection, bias=False)
        nn.init.normal_(self.token.weight, std=config.init_std)
        nn.init.normal_(self.position.weight, std=config.init_std / 2)

    def states(self, ids: Tensor, skip: int = 0) -> TextStates:
        """`skip` ("clip skip") is the number of final blocks that `read` leaves out; `last` has all blocks.

        Raises ValueError when there are fewer blocks than `skip`, or more tokens than positions.
        Shapes: ids (b t) -> (b t d), (b t d)
        """
        most = self.config.layers - self.config.penultimate
        if not 0 <= skip <= most:
            raise ValueError(f"clip skip must be in [0, {most}], the blocks of this text encoder, got {skip}")
        if ids.shape[1] > self.config.length:
            raise ValueError(f"{ids.shape[1]} tokens, but the encoder has {self.config.length} positions")
        after = [self.token(ids) + self.position.weight[: ids.shape[1]]]  # states after 0, 1, ... blocks
        for block in self.blocks:
            after.append(block(after[-1], causal=True))
        read = after[-1 - skip - self.config.penultimate]
        return TextStates(read if self.config.penultimate else self.norm_out(read), self.norm_out(after[-1]))

    def forward(self, ids: Tensor, skip: int = 0) -> Tensor:
        """The hidden states that condition a diffusion model.  Shapes: ids (b t) -> (b t d)"""
        return self.states(ids, skip).read

    def pooled(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The state at the first end-of-text token, which attends to the whole sentence.

        CLIP pools `states(ids).last`.  Raises ValueError when a sentence has no end-of-text token.
        Shapes: hidden (b t d), ids (b t) -> (b d)
        """
        ends = ids == self.config.eos
        if without := int((~ends.any(dim=1)).sum()):
            raise ValueError(f"{without} of {len(ids)} sentences have no end-of-text token {self.config.eos}")
        first = ends.int().argmax(dim=1)  # (b); argmax returns the first maximum
        return hidden[torch.arange(len(ids), device=ids.device), first]


class TwoTextEncoders(nn.Module):
    """SDXL's two text encoders; their hidden states are concatenated along the width.

    The UNet also needs the pooled and projected state of the second encoder.  It is padded with zeros and
    appended as the last row, so that a prompt remains a single tensor.
    """

    def __init__(self, first: TextEncoder, second: TextEncoder) -> None:
        super().__init__()
        widest, projection = first.config.width + second.config.width, second.config.projection
        if projection is None or projection > widest:
            raise ValueError(f"the second encoder needs a projection, at most {widest} wide")
        self.first, self.second = first, second

    def forward(self, ids: Tensor, skip: int = 0) -> Tensor:
        """Shapes: ids (b 2t), those of the first encoder and then of the second -> (b t+1 d), d = d1 + d2"""
        one, two = ids.chunk(2, dim=1)  # (b t) each
        states = self.second.states(two, skip)
        hidden = torch.cat([self.first(one, skip), states.read], dim=2)  # (b t d1+d2)
        pooled = self.second.text_projection(self.second.pooled(states.last, two))  # (b e)
        row = F.pad(pooled, (0, hidden.shape[2] - pooled.shape[1]))  # (b d)
        return torch.cat([hidden, row[:, None]], dim=1)


class ConvStem(nn.Module):
    """A patch embedding by strided convolutions, which needs fewer training pictures than a linear one.

    Xiao et al. 2021, arXiv 2106.14881
    """

    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 4, stride=2, padding=1)
        self.down = nn.ModuleList(Downsample(c) for c in channels)
        widths = zip(channels, (*channels[1:], width))
        self.res = nn.ModuleList(ResBlock(a, b, groups=8, eps=1e-5) for a, b in widths)

    def forward(self, images: Tensor) -> Tensor:
        """Shapes: images (b 3 h w) -> (b d h/p w/p)"""
        x = self.conv_in(images)  # (b c h/2 w/2)
        for down, res in zip(self.down, self.res):
            x = res(down(x))  # half the resolution, then the next number of channels
        return x


class VisionEncoder(nn.Module):
    """Encodes a picture as the state of a class token and one state per patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        d, p = config.width, config.patch
        self.class_token = nn.Parameter(torch.randn(d) * d**-0.5)
        self.patch = ConvStem(config.stem, d) if config.stem else nn.Conv2d(3, d, p, stride=p, bias=False)
        self.position = nn.Embedding(1 + (config.size // p) ** 2, d)
        self.norm_in = nn.LayerNorm(d)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        nn.init.normal_(self.position.weight, std=config.init_std)

    def forward(self, images: Tensor) -> Tensor:
        """The states after the last block, not normalised; the first is that of the class token.

        Raises ValueError on pictures of another size than `config.size`.
        Shapes: images (b 3 h w) -> (b 1+n d)
        """
        size = self.config.size
        if images.shape[2:] != (size, size):
            raise ValueError(f"pictures of {images.shape[2]} x {images.shape[3]}, expected {size} x {size}")
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.config.mean, self.config.std))
        x = rearrange(self.patch((images - mean) / std), "b d h w -> b (h w) d")  # (b n d)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)  # (b 1+n d)
        return self.blocks(self.norm_in(x + self.position.weight))


class CLIP(nn.Module):
    """Both encoders and their projections into the joint space."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.text, self.vision = TextEncoder(config.text), VisionEncoder(config.vision)
        self.text_projection = nn.Linear(config.text.width, config.width, bias=False)
        self.image_norm = nn.LayerNorm(config.vision.width)
        self.image_projection = nn.Linear(config.vision.width, config.width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # section 2.5: temperature 0.07

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings of length 1.  Shapes: images (b 3 h w) -> (b e)"""
        pooled = self.image_norm(self.vision(images)[:, 0])  # (b d) the class token
        return F.normalize(self.image_projection(pooled), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Embeddings of length 1.  Shapes: ids (b t) -> (b e)"""
        pooled = self.text.pooled(self.text.states(ids).last, ids)  # (b d)
        return F.normalize(self.text_projection(pooled), dim=-1)


# --- the matcher --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MatcherConfig(Checked):
    vocabulary: Size  # number of token ids
    eos: Natural  # id of the end-of-text token
    length: Size  # longest sentence, in tokens
    width: Size = 96  # d, width of both encoders and the head
    layers: Depth = 3  # transformer blocks of the text encoder
    vision_layers: Depth = 1  # transformer blocks of the image encoder, after its convolutional stem
    heads: Size = 4
    depth: Depth = 2  # cross-attention blocks of the head
    size: Size = 64  # side of the pictures in pixels
    stem: tuple[Size, ...] = (32, 64)  # channels of the stem; two entries make patches of 8 pixels
    fused: bool = False  # each block of the head begins with self-attention between words, as in ALBEF
    # std of the initial token embeddings, half of it for positions; positions are learnt slowly with 0.02
    init_std: Positive = 0.02

    @property
    def text(self) -> TextConfig:
        sizes = (self.vocabulary, self.eos, self.length, self.width, self.layers, self.heads)
        return TextConfig(*sizes, init_std=self.init_std)

    @property
    def vision(self) -> VisionConfig:
        sizes = (self.size, stem_patch(self.stem), self.width, self.vision_layers, self.heads)
        return VisionConfig(*sizes, stem=self.stem, init_std=self.init_std)


class CrossBlock(nn.Module):
    """Self-attention between words if `fused`, cross-attention to the patches, and a feed-forward layer.

    Without self-attention, words cannot exchange what they found in the picture.  This suffices for facts
    about one object, but relations between objects are learnt slowly.
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
        """Each picture is attended to by b/p consecutive sentences; its keys and values are computed once.

        Shapes: x (b t d), patches (p n d) -> (b t d)
        """
        if self.fused:
            x = x + self.own(self.norm0(x), causal=True)
        t = x.shape[1] * (len(x) // max(1, len(patches)))  # number of words that attend to one picture
        queries = self.norm1(x).view(len(patches), t, x.shape[2])  # (p b/p*t d)
        x = x + self.attn(queries, patches).view_as(x)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Matcher(nn.Module):
    """CLIP's two encoders, and a head that predicts whether a sentence holds for a picture."""

    def __init__(self, config: MatcherConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.text, self.vision = TextEncoder(config.text), VisionEncoder(config.vision)
        self.norm_patches = nn.LayerNorm(d)
        self.blocks = nn.ModuleList(CrossBlock(d, config.heads, config.fused) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(d)
        self.verdict, self.next_word = nn.Linear(d, 1), nn.Linear(d, config.vocabulary)

    def attend(self, patches: Tensor, hidden: Tensor) -> Tensor:
        """The states of the words after attention to the patches; b/p consecutive sentences for each picture.

        Shapes: patches (p n d), hidden (b t d) -> (b t d)
        """
        x, patches = hidden, self.norm_patches(patches)
        for block in self.blocks:
            x = block(x, patches)  # (b t d)
        return self.norm_out(x)

    def match(self, patches: Tensor, hidden: Tensor, ids: Tensor) -> Tensor:
        """The logit that each sentence holds for its picture; b/p consecutive sentences for each picture.

        Shapes: patches (p n d), hidden (b t d), ids (b t) -> (b)
        """
        return self.verdict(self.text.pooled(self.attend(patches, hidden), ids))[:, 0]

    def describe(self, patches: Tensor, hidden: Tensor) -> Tensor:
        """Logits of the token after each token.  Shapes: patches (b n d), hidden (b t d) -> (b t v)"""
        return self.next_word(self.attend(patches, hidden))

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """The logit that each sentence holds for its picture.  Shapes: images (b 3 h w), ids (b t) -> (b)"""
        return self.match(self.vision(images), self.text(ids), ids)
