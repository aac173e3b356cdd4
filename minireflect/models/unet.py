"""The UNet that predicts the noise; one class for a toy of 1 million parameters, SD 1.x, SD 2.x and SDXL.

    Ronneberger et al. 2015, "U-Net"; Rombach et al. 2022, "Latent Diffusion", section 3.3
    Podell et al. 2023, "SDXL", sections 2.1 and 2.2

    on the way down, store every feature map
    on the way up, concatenate each feature map with the stored one of the same resolution
    the time conditions each residual block, and the prompt each attention block

With the same weights it gives the outputs of diffusers.  Differs from diffusers: residual branches and the
output layer are initialised with zeros, as in the original latent-diffusion code.

Shapes: b batch, c channels, h w space, t tokens of the prompt, d width, e width of the time embedding.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ranges import Checked, Depth, Range, Size
from .blocks import Downsample, Layer, Level, ResBlock, SpatialTransformer, Upsample, require_levels, zero

EPS = 1e-5  # epsilon of the GroupNorms in SD's UNets


@dataclass(frozen=True)
class UNetConfig(Checked):
    channels: tuple[Size, ...]  # one entry per level, from the finest to the coarsest
    depths: tuple[Depth, ...]  # transformer blocks behind each residual block, per level; 0 = no attention
    mid_depth: Depth  # transformer blocks in the middle; 0 = no attention there
    context_width: Annotated[int, Range(0, 1 << 20)]  # width of the prompt's hidden states
    res_blocks: Depth = 2  # residual blocks per level on the way down; one more on the way up
    # attention heads, for all levels or per level (the middle has those of the last); or give head_width
    heads: Size | tuple[Size, ...] | None = None
    head_width: Size | None = None  # channels per attention head on all levels; or give heads
    use_linear_projection: bool = False  # linear layers (SD 2.x, SDXL), not 1x1 convolutions (SD 1.x)
    in_channels: Size = 4  # channels of the latents
    out_channels: Size = 4  # channels of the predicted noise
    groups: Size = 32  # groups of each GroupNorm
    pooled_width: Size | None = None  # SDXL: width of the pooled prompt; None = no added conditioning
    size_count: Size = 6  # SDXL: numbers that state sizes and crop, used only with pooled_width
    size_width: Size = 256  # SDXL: width of the embedding of each of these numbers
    # side of the latents, if each position has a learnt embedding; None = no embeddings, as in SD
    side: Size | None = None
    # Distilled networks: transformer blocks behind each residual block, per level and finest level first;
    # they replace depths and res_blocks
    down: tuple[tuple[Depth, ...], ...] | None = None
    up: tuple[tuple[Depth, ...], ...] | None = None
    mid_blocks: Depth = 2  # residual blocks in the middle

    def require(self) -> None:
        levels = len(self.channels)
        for name, each in {"depths": self.depths, "heads": self.heads}.items():
            if isinstance(each, tuple) and len(each) != levels:
                raise ValueError(f"there are {levels} channels but {len(each)} {name}: give one per level")
        if (self.heads is None) == (self.head_width is None):
            raise ValueError(f"give heads or head_width, one of them: got {self.heads} and {self.head_width}")
        require_levels(self.channels, groups=self.groups, head_width=self.head_width or 1)

    def layers(self, way: tuple[tuple[int, ...], ...] | None, more: int) -> tuple[tuple[int, ...], ...]:
        """Transformer blocks behind each residual block, per level.

        `way` is `down` or `up`; where it is None, each level has `res_blocks + more` residual blocks.
        """
        return way or tuple((depth,) * (self.res_blocks + more) for depth in self.depths)

    @property
    def time_width(self) -> int:
        return 4 * self.channels[0]


# For latents of 4 x 8 x 8; 2.2 million parameters.
TOY_UNET = UNetConfig((48, 96), (1, 1), 0, context_width=96, res_blocks=1, heads=4, groups=16)
# For scene graphs; 1.0 million parameters.  Without position embeddings it does not learn "at the top left".
SMALL_UNET = UNetConfig((32, 64), (1, 1), 0, context_width=64, res_blocks=1, heads=4, groups=8, side=8)


class Added(NamedTuple):
    """SDXL's added conditioning: the prompt as one vector, and the size and crop of the picture."""

    pooled: Tensor  # (b d) pooled and projected state of the second text encoder
    # (b 6) original height and width, crop top and left, target height and width, in pixels
    sizes: Tensor


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of numbers (times, or sizes in pixels): cosines, then sines, d = `width`.

    Shapes: t (b) -> (b d).  Raises ValueError when `width` is odd.
    """
    if width % 2:
        raise ValueError(f"width {width} must be even: an embedding has as many cosines as sines")
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device) / half
    # 10,000: Vaswani et al. 2017, section 3.5
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def mlp(d: int, e: int) -> nn.Sequential:
    """Two linear layers that map an embedding to the width of the time embedding.  (b d) -> (b e)"""
    return nn.Sequential(OrderedDict(fc1=nn.Linear(d, e), silu=nn.SiLU(), fc2=nn.Linear(e, e)))


class UNet(nn.Module):
    """Predicts the noise in `x` at time `t`, conditioned on the prompt `context`.

    Set the attribute `checkpointing` to save memory in training; layers are then evaluated twice.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        first, coarsest = config.channels[0], len(config.channels) - 1

        self.time = mlp(first, config.time_width)
        if config.pooled_width is not None:
            self.added = mlp(config.pooled_width + config.size_count * config.size_width, config.time_width)
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        if config.side is not None:
            self.where = nn.Parameter(torch.zeros(first, config.side, config.side))

        self.down = nn.ModuleList()
        skips, c = [first], first  # channels of the stored feature maps, and of the current one
        for i, (c_out, depths) in enumerate(zip(config.channels, config.layers(config.down, 0))):
            layers = [self._layer(c if j == 0 else c_out, i, n) for j, n in enumerate(depths)]
            self.down.append(Level(layers, Downsample(c_out) if i < coarsest else None))
            skips += [c_out] * (len(depths) + (i < coarsest))
            c = c_out

        # two residual blocks with attention between them
        self.mid = Level([self._layer(c, coarsest, n) for n in [config.mid_depth, 0][: config.mid_blocks]])

        self.up = nn.ModuleList()
        for i, (c_out, depths) in reversed([*enumerate(zip(config.channels, config.layers(config.up, 1)))]):
            layers = [self._layer((c if j == 0 else c_out) + skips.pop(), i, n) for j, n in enumerate(depths)]
            self.up.append(Level(layers, Upsample(c_out) if i > 0 else None))
            c = c_out

        self.norm_out = nn.GroupNorm(config.groups, first, eps=EPS)
        self.conv_out = zero(nn.Conv2d(first, config.out_channels, 3, padding=1))

    def _layer(self, c_in: int, level: int, depth: int) -> Layer:
        """A residual block of a level, followed by `depth` transformer blocks."""
        cfg, c_out = self.config, self.config.channels[level]
        res = ResBlock(c_in, c_out, cfg.groups, EPS, cfg.time_width)
        if depth == 0:
            return Layer(res)
        heads = c_out // cfg.head_width if cfg.heads is None else cfg.heads
        heads = heads if isinstance(heads, int) else heads[level]
        sizes = (heads, cfg.context_width, depth, cfg.groups)
        return Layer(res, SpatialTransformer(c_out, *sizes, cfg.use_linear_projection))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, added: Added | None = None) -> Tensor:
        """The predicted noise (v or x_0 for schedules with another `prediction`) at the integer time `t`.

        Raises ValueError unless h and w are multiples of 2^(levels - 1), d is `context_width`, and `added` is
        given if and only if there is a `pooled_width`.
        Shapes: x (b c h w), t () or (b), context (b t d) -> (b c h w)
        """
        self._check(x, context, added)
        # fmt: off
        temb = self.embed_time(x, t, added)                             # (b e)
        x = self.conv_in(x)                                             # (b c0 h w)
        x = x if self.config.side is None else x + self.where
        skips = [x]
        for level in self.down:
            for layer in level.layers:
                x = self._run(layer, x, temb, context)                  # (b ci h/2^i w/2^i)
                skips.append(x)
            if level.resize is not None:
                x = level.resize(x)                                     # (b ci h/2^(i+1) w/2^(i+1))
                skips.append(x)
        for layer in self.mid.layers:
            x = self._run(layer, x, temb, context)
        for level in self.up:
            for layer in level.layers:
                x = torch.cat([x, skips.pop()], dim=1)                  # (b c+skip h/2^i w/2^i)
                x = self._run(layer, x, temb, context)                  # (b ci h/2^i w/2^i)
            x = x if level.resize is None else level.resize(x)
        return self.conv_out(F.silu(self.norm_out(x)))                  # (b c h w)
        # fmt: on

    def embed_time(self, x: Tensor, t: Tensor, added: Added | None) -> Tensor:
        """The embedding of the time and of SDXL's added conditioning, which every residual block adds.

        Shapes: x (b c h w), t () or (b) -> (b e)
        """
        temb = self.time(timestep_embedding(t.expand(x.shape[0]), self.config.channels[0]).to(x.dtype))
        if added is None:
            return temb
        sizes = timestep_embedding(added.sizes.flatten(), self.config.size_width).view(len(x), -1)  # (b 6*d)
        return temb + self.added(torch.cat([added.pooled, sizes.to(x.dtype)], dim=1))

    def _run(self, layer: Layer, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return layer(x, temb, context)
        # Layers draw no random numbers, so the state of the generator need not be restored.
        return checkpoint(layer, x, temb, context, use_reentrant=False, preserve_rng_state=False)

    def _check(self, x: Tensor, context: Tensor, added: Added | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"latents {tuple(x.shape)}, expected {self.config.in_channels} channels")
        multiple = 2 ** (len(self.config.channels) - 1)
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(f"latents of {x.shape[2]} x {x.shape[3]} are not a multiple of {multiple}")
        if context.shape[-1] != self.config.context_width:
            raise ValueError(f"context of width {context.shape[-1]}, expected {self.config.context_width}")
        if (added is None) != (self.config.pooled_width is None):
            raise ValueError("give `added` if and only if the UNet has pooled_width (SDXL)")
