"""Pictures to latents and back: the KL autoencoder of Stable Diffusion, from a toy to the real size.

    Rombach et al. 2022, "Latent Diffusion", section 3.1 and appendix G
    Kingma & Welling 2014, "Auto-Encoding Variational Bayes", for the Gaussian code

    encode:  images -> mean, logvar of a Gaussian per latent -> a sample (or the mean), times scaling_factor
    decode:  latents / scaling_factor -> images

Differs from the references: residual branches start at zero (see blocks.py).

Shapes: b batch, h w space in pixels, z latent channels, f = 2^(levels - 1) the factor in resolution.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..ranges import Checked, Depth, Positive, Size
from .blocks import Downsample, Layer, Level, PixelAttention, ResBlock, Upsample, require_levels

EPS = 1e-6  # of the GroupNorms in SD's autoencoder


@dataclass(frozen=True)
class AutoencoderConfig(Checked):
    channels: tuple[Size, ...]  # one entry per level, from the finest to the coarsest
    res_blocks: Depth = 2  # residual blocks per level in the encoder; one more in the decoder
    groups: Size = 32  # of every GroupNorm
    in_channels: Size = 3  # of the pictures
    latent_channels: Size = 4
    scaling_factor: Positive = 1.0  # latents are multiplied by it, so that their std is about 1
    mid_attention: bool = True  # attention between all pixels of the coarsest level
    # of the unscaled latents, per channel: what is subtracted, and divided by; empty = 0 and 1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_levels(self.channels, groups=self.groups)

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (len(self.channels) - 1)


# Pictures of 3 x 64 x 64 to latents of 4 x 8 x 8; 2.7 million parameters, most of them at 8 x 8.
TOY_AUTOENCODER = AutoencoderConfig((16, 32, 64, 128), res_blocks=1, groups=8)
# For scene graphs, whose pictures are flat shapes on paper: half the parameters.
FLAT_AUTOENCODER = AutoencoderConfig((16, 32, 64, 96), res_blocks=1, groups=8)


def encoder(config: AutoencoderConfig) -> nn.Sequential:
    """From pictures to the mean and log-variance of the latents, stacked as channels.

    Shapes of its layers: (b 3 h w) -> (b c0 h w), the levels -> (b cn h/f w/f), the end -> (b 2z h/f w/f)
    """
    first, last = config.channels[0], config.channels[-1]
    half = partial(Downsample, pad_all_around=False)
    start = nn.Conv2d(config.in_channels, first, 3, padding=1)
    down = levels(config.channels, config.res_blocks, half, config.groups)
    layers = {"conv_in": start, "down": down, "mid": middle(last, config)}
    return nn.Sequential(OrderedDict(layers | ending(last, 2 * config.latent_channels, config.groups)))


def decoder(config: AutoencoderConfig) -> nn.Sequential:
    """From latents to pictures.

    Shapes of its layers: (b z h/f w/f) -> (b cn h/f w/f), the levels -> (b c0 h w), the end -> (b 3 h w)
    """
    first, last = config.channels[-1], config.channels[0]
    start = nn.Conv2d(config.latent_channels, first, 3, padding=1)
    layers = {"conv_in": start, "mid": middle(first, config)}
    layers["up"] = levels(config.channels[::-1], config.res_blocks + 1, Upsample, config.groups)
    return nn.Sequential(OrderedDict(layers | ending(last, config.in_channels, config.groups)))


class Autoencoder(nn.Module):
    """Encoder and decoder around a small Gaussian code. Pictures in [-1, 1], latents of about unit size."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = encoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.decoder = decoder(config)

    def _of(self, values: tuple[float, ...], otherwise: float, like: Tensor) -> Tensor:
        """A number for each latent channel.  -> (z 1 1) or (1 1 1)"""
        return like.new_tensor(values or (otherwise,))[:, None, None]

    def _scaled(self, z: Tensor) -> Tensor:
        c = self.config
        return (z - self._of(c.mean, 0.0, z)) / self._of(c.std, 1.0, z) * c.scaling_factor

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
            return self._scaled(mean)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
        return self._scaled(mean + (logvar / 2).exp() * noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, about in [-1, 1] but not clamped.  Shapes: latents (b z h/f w/f) -> (b 3 h w)"""
        c = self.config
        z = latents / c.scaling_factor * self._of(c.std, 1.0, latents) + self._of(c.mean, 0.0, latents)
        return self.decoder(self.post_quant_conv(z))


def levels(channels: tuple[int, ...], n: int, resize: Callable, groups: int) -> nn.Sequential:
    """A level of n residual blocks for each entry of `channels`; the first reads as many as it has.

    All levels but the last end with `resize(channels)`.
    """
    made = nn.Sequential()
    for i, (c, c_out) in enumerate(zip((channels[0], *channels), channels)):
        layers = [Layer(ResBlock(c if j == 0 else c_out, c_out, groups, EPS)) for j in range(n)]
        made.append(Level(layers, resize(c_out) if i + 1 < len(channels) else None))
    return made


def middle(channels: int, config: AutoencoderConfig) -> Level:
    """The layers at the coarsest resolution, the only ones where every pixel may see every other."""
    attn = PixelAttention(channels, config.groups, EPS) if config.mid_attention else None
    first, second = (ResBlock(channels, channels, config.groups, EPS) for _ in range(2))
    return Level([Layer(first, attn), Layer(second)])


def ending(c_in: int, c_out: int, groups: int) -> dict[str, nn.Module]:
    """The last layers of encoder and decoder."""
    norm, conv = nn.GroupNorm(groups, c_in, eps=EPS), nn.Conv2d(c_in, c_out, 3, padding=1)
    return {"norm_out": norm, "silu": nn.SiLU(), "conv_out": conv}
