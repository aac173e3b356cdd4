"""Building blocks of the latent-diffusion networks: residual blocks, attention, and levels that stack them.

The UNet and the autoencoder are both stacks of *levels*.  A level works at one resolution.  It has several
layers, each a residual block with or without attention behind it, and then may change the resolution.

    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", appendix B: the UNet
    Rombach et al. 2022, "Latent Diffusion", section 3.3 and appendix E.2.1: the spatial transformer

Shapes: b batch, c channels, h w space, t tokens, d width, e width of the time embedding.  A 2 as in c2
stands for another size.
"""

from itertools import product

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, channels_last, nn


def zero(module: nn.Module) -> nn.Module:
    """Set all parameters to 0.  A residual branch that ends with this module then starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def require_multiple(name: str, value: int, of: str, divisor: int) -> None:
    """Raise ValueError, which states `name` and `of`, unless `value` is a multiple of `divisor`."""
    if value % divisor:
        raise ValueError(f"{name} {value} is not a multiple of {of} {divisor}")


def require_levels(channels: tuple[int, ...], **divisors: int) -> None:
    """Raise ValueError unless there are 1 to 10 levels and all channels are multiples of each divisor."""
    if not 1 <= len(channels) <= 10:
        raise ValueError(f"channels must have 1 to 10 levels, got {len(channels)}")
    for c, (name, divisor) in product(channels, divisors.items()):
        require_multiple("channels", c, name, divisor)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1.

    On a CPU, torch reorders the weights in memory in every call.  For maps of at most 4 pixels this takes
    most of the time, and multiplying unfolded patches with the weights is up to five times as fast.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (b c h w) -> (b c2 h w)"""
        if x.shape[2] * x.shape[3] > 4:
            return super().forward(x)
        patches = rearrange(F.unfold(x, 3, padding=1), "b patch pixel -> (b pixel) patch")
        y = F.linear(patches, self.weight.flatten(1), self.bias)  # (b*h*w c2)
        return rearrange(y, "(b h w) c -> b c h w", h=x.shape[2], w=x.shape[3]).contiguous()


class ResBlock(nn.Module):
    """Two convolutions and a skip connection; the time embedding, if any, is added between the convolutions.

    `time_width` is e, the width of the time embedding; None = no time embedding (the autoencoder).
    """

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float, time_width: int | None = None) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=eps), Conv3x3(c_in, c_out)
        self.time = None if time_width is None else nn.Linear(time_width, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=eps), zero(Conv3x3(c_out, c_out))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Shapes: x (b c h w), temb (b e) -> (b c2 h w)"""
        y = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None:
            y = y + self.time(F.silu(temb))[:, :, None, None]
        y = F.silu(self.norm2(y))  # overwriting y frees the memory of conv1's output before conv2 runs
        return self.skip(x) + self.conv2(y)


class Downsample(nn.Module):
    """Halve the resolution with a strided convolution.

    The UNet pads all four sides, the autoencoder only right and bottom, as in Stable Diffusion.
    """

    def __init__(self, channels: int, pad_all_around: bool = True) -> None:
        super().__init__()
        self.pad_all_around = pad_all_around
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if pad_all_around else 0)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (b c h w) -> (b c h/2 w/2)"""
        return self.conv(x if self.pad_all_around else F.pad(x, (0, 1, 0, 1)))  # left, right, top, bottom


class Upsample(nn.Module):
    """Double the resolution: repeat each pixel, then apply a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (b c h w) -> (b c 2h 2w)"""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention from `x` to `context`; self-attention if there is no context.

    Query, key and value are separate layers, so that LoRA can adapt each by its name.
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, bias: bool = False) -> None:
        super().__init__()
        require_multiple("width", width, "heads", heads)
        self.heads = heads
        self.q = nn.Linear(width, width, bias=bias)
        self.k, self.v = (nn.Linear(context_width or width, width, bias=bias) for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        """Shapes: x (b t d), context (b t2 d2) -> (b t d)"""
        source = x if context is None else context
        rows = self.q(x), self.k(source), self.v(source)  # (b t d) each
        q, k, v = (rearrange(y, "b t (head d) -> b head t d", head=self.heads) for y in rows)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(rearrange(y, "b head t d -> b t (head d)"))


class GEGLU(nn.Module):
    """A feed-forward layer: one half of the hidden units gates the other (Shazeer 2020, "GLU Variants")."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 8 * width)  # 4 * width values and 4 * width gates
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (b t d) -> (b t d)"""
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention between pixels, cross-attention to the prompt, a feed-forward layer; all residual."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1, self.self_attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.cross_attn = nn.LayerNorm(width), Attention(width, heads, context_width)
        self.norm3, self.ff = nn.LayerNorm(width), GEGLU(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Shapes: x (b t d), context (b t2 d2) -> (b t d)"""
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks on a feature map as a sequence of pixels; the result is added to the map.

    `proj_in` and `proj_out` are 1x1 convolutions in SD 1.x and linear layers in SD 2.x and SDXL.  Both
    compute the same function, but their weights have different shapes in checkpoints.
    """

    def __init__(self, c: int, heads: int, context_width: int, depth: int, groups: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)  # SD uses 1e-6 here, 1e-5 in the residual blocks
        self.proj_in = nn.Linear(c, c) if linear else nn.Conv2d(c, c, 1)
        self.blocks = nn.ModuleList(TransformerBlock(c, heads, context_width) for _ in range(depth))
        self.proj_out = zero(nn.Linear(c, c) if linear else nn.Conv2d(c, c, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Shapes: x (b c h w), context (b t d) -> (b c h w)"""
        pixels, image = "b c h w -> b (h w) c", "b (h w) c -> b c h w"
        y = self.norm(x).to(memory_format=channels_last)  # makes 1x1 convolutions faster on a CPU
        y = self.proj_in(rearrange(y, pixels)) if self.linear else rearrange(self.proj_in(y), pixels)
        for block in self.blocks:
            y = block(y, context)  # (b h*w c)
        if self.linear:
            return x + rearrange(self.proj_out(y), image, h=x.shape[2])
        return x + self.proj_out(rearrange(y, image, h=x.shape[2]))


class PixelAttention(nn.Module):
    """The autoencoder's self-attention between all pixels, with one head; `context` is ignored."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm, self.self_attn = nn.GroupNorm(groups, channels, eps=eps), Attention(channels, 1, bias=True)

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        """Shapes: x (b c h w) -> (b c h w)"""
        y = rearrange(self.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(self.self_attn(y), "b (h w) c -> b c h w", h=x.shape[2])


class Layer(nn.Module):
    """A residual block, then attention if there is any."""

    def __init__(self, res: ResBlock, attn: SpatialTransformer | PixelAttention | None = None) -> None:
        super().__init__()
        self.res, self.attn = res, attn

    def forward(self, x: Tensor, temb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Shapes: x (b c h w), temb (b e), context (b t d) -> (b c2 h w)"""
        x = self.res(x, temb)
        return x if self.attn is None else self.attn(x, context)


class Level(nn.Module):
    """The layers of one resolution, then a change of resolution if there is one."""

    def __init__(self, layers: list[Layer], resize: Downsample | Upsample | None = None) -> None:
        super().__init__()
        self.layers, self.resize = nn.Sequential(*layers), resize

    def forward(self, x: Tensor) -> Tensor:
        """Used by the autoencoder only: the UNet calls the layers itself, because it keeps each output.

        Shapes: x (b c h w) -> (b c2 h2 w2)
        """
        x = self.layers(x)
        return x if self.resize is None else self.resize(x)
