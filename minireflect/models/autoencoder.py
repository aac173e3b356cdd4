"""Pictures to latents and back: the KL autoencoder of Stable Diffusion, from a toy to the real size.

    Rombach et al. 2022, "Latent Diffusion", section 3.1 and appendix G
    Kingma & Welling 2014, "Auto-Encoding Variational Bayes", for the Gaussian code

    encode:  images -> mean, logvar of a Gaussian per latent -> a sample (or the mean), times scaling_factor
    decode:  latents / scaling_factor -> images

Differs from the references: residual branches start at zero (see blocks.py).

Shapes: b batch, h w space in pixels, z latent channels, f = 2^(levels - 1) the factor in resolution.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Downsample, Layer, Level, PixelAttention, ResBlock, Upsample

EPS = 1e-6  # of the GroupNorms in SD's autoencoder


@dataclass(frozen=True)
class AutoencoderConfig:
    channels: tuple[int, ...]  # one entry per level, from the finest to the coarsest
    res_blocks: int = 2  # residual blocks per level in the encoder; one more in the decoder
    groups: int = 32  # of every GroupNorm
    in_channels: int = 3  # of the pictures
    latent_channels: int = 4
    scaling_factor: float = 1.0  # latents are multiplied by it, so that their standard deviation is about 1
    mid_attention: bool = True  # attention between all pixels of the coarsest level

    def __post_init__(self) -> None:
        for channels in self.channels:
            if channels % self.groups:
                raise ValueError(f"channels {channels} is not a multiple of groups {self.groups}")

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def toy(cls) -> "AutoencoderConfig":
        """Pictures of 3 x 64 x 64 to latents of 4 x 8 x 8; 2.7 million parameters, most of them at 8 x 8."""
        return cls(channels=(16, 32, 64, 128), res_blocks=1, groups=8)

    @classmethod
    def flat(cls) -> "AutoencoderConfig":
        """For scene graphs, whose pictures are flat shapes on paper: half the parameters."""
        return cls(channels=(16, 32, 64, 96), res_blocks=1, groups=8)


class Encoder(nn.Module):
    """From pictures to the mean and log-variance of the latents, stacked as channels."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        first, last = config.channels[0], config.channels[-1]
        half = partial(Downsample, pad_all_around=False)
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.down = levels(first, config.channels, config.res_blocks, half, config.groups)
        self.mid = middle(last, config)
        self.norm_out = nn.GroupNorm(config.groups, last, eps=EPS)
        self.conv_out = nn.Conv2d(last, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (b 3 h w) -> (b 2z h/f w/f)"""
        x = self.conv_in(x)  # (b c0 h w)
        for level in self.down:
            x = level(x)  # (b ci h/2^i w/2^i)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))  # (b 2z h/f w/f)


class Decoder(nn.Module):
    """From latents to pictures."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        first, last = config.channels[-1], config.channels[0]
        self.conv_in = nn.Conv2d(config.latent_channels, first, 3, padding=1)
        self.mid = middle(first, config)
        self.up = levels(first, config.channels[::-1], config.res_blocks + 1, Upsample, config.groups)
        self.norm_out = nn.GroupNorm(config.groups, last, eps=EPS)
        self.conv_out = nn.Conv2d(last, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Shapes: z (b z h/f w/f) -> (b 3 h w)"""
        x = self.mid(self.conv_in(z))  # (b cn h/f w/f)
        for level in self.up:
            x = level(x)  # (b ci h/2^i w/2^i), i falling to 0
        return self.conv_out(F.silu(self.norm_out(x)))  # (b 3 h w)


class Autoencoder(nn.Module):
    """Encoder and decoder around a small Gaussian code. Pictures in [-1, 1], latents of about unit size."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.decoder = Decoder(config)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the unscaled latents.

        Shapes: images (b 3 h w) -> (b z h/f w/f), (b z h/f w/f)
        """
        f = self.config.factor
        if images.shape[2] % f or images.shape[3] % f:
            raise ValueError(f"pictures of {images.shape[2]} x {images.shape[3]} are not a multiple of {f}")
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # the bounds of the original code: exp stays finite in float32

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents: the mean, or with a generator a sample.

        Shapes: images (b 3 h w) -> (b z h/f w/f)
        """
        mean, logvar = self.moments(images)
        if generator is None:
            return mean * self.config.scaling_factor
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
        return (mean + (logvar / 2).exp() * noise) * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, about in [-1, 1] but not clamped.  Shapes: latents (b z h/f w/f) -> (b 3 h w)"""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))


def levels(c: int, channels: tuple[int, ...], n: int, resize: Callable, groups: int) -> nn.ModuleList:
    """A level of n residual blocks for each entry of `channels`, the first reads c channels.

    All levels but the last end with `resize(channels)`.
    """
    made = nn.ModuleList()
    for i, c_out in enumerate(channels):
        layers = [Layer(ResBlock(c if j == 0 else c_out, c_out, groups, EPS)) for j in range(n)]
        made.append(Level(layers, resize(c_out) if i + 1 < len(channels) else None))
        c = c_out
    return made


def middle(channels: int, config: AutoencoderConfig) -> Level:
    """The layers at the coarsest resolution, the only ones where every pixel may see every other."""
    attn = PixelAttention(channels, config.groups, EPS) if config.mid_attention else None
    first, second = (ResBlock(channels, channels, config.groups, EPS) for _ in range(2))
    return Level([Layer(first, attn), Layer(second)])
