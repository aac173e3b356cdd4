"""Autoencoders: pictures to continuous latents (Stable Diffusion's VAE), or to discrete codes (VQ-VAE).

The variational autoencoder; one class serves the toy and the real sizes of Stable Diffusion:

    Rombach et al. 2022, "Latent Diffusion", section 3.1 and appendix G
    Kingma & Welling 2014, "Auto-Encoding Variational Bayes", for the Gaussian latents

    encode:  images -> mean, logvar of each latent -> the mean, times scaling_factor
    decode:  latents / scaling_factor -> images

Differs from the references: residual branches start at zero (see blocks.py).  `encode` returns the mean; only
the training of the autoencoder samples latents.

The vector-quantised autoencoder, which turns a picture into the image tokens of ReasonGen-R1:

    z_q = e_k,   k = argmin_j |z - e_j|             van den Oord et al. 2017, arXiv 1711.00937, equations 1, 2
    z_q = z + sg[z_q - z]                           straight-through estimator; sg is stop-gradient
    L_vq = |sg[z] - e_k|^2 + beta |z - sg[e_k]|^2   equation 3, the second and third term

Encodings z and codebook entries e are normalised to length 1 and have few dimensions (Yu et al. 2022, arXiv
2110.04627, section 3.2; LlamaGen and Janus, on which ReasonGen-R1 builds, do the same).  The nearest entry is
then the one with the largest cosine, and nearly all entries are used.  Unused entries are moved onto
encodings that are far from their nearest entry (`revive`), as in Jukebox (Dhariwal et al. 2020, section 3.1).

There are two codebooks.  Each patch of 8x8 pixels becomes two entries: one for its form, one for its colours.
What a model learns about a form then holds in every colour.  In training the form is encoded from a twin of
the picture, the same scene in other colours, so that it carries little information about colour.  The two
entries are also written as one number, the code:  code = form * colors + color.

The encoders process each patch separately, so that equal patches get equal codes in every picture.  A model
needs this to generate combinations that it has never seen.  (A codebook for the latents of the first
autoencoder lacks this property: its GroupNorms mix information from the whole picture, and a third of the
patches that were equal in every pixel got different codes.)  The decoder processes all codes together and
predicts latents of the first autoencoder, whose decoder makes the pixels.

Shapes: b batch, c channels, h w pixels, z latent channels, f = 2^(levels - 1) the downsampling factor.  In
the vector-quantised autoencoder: h w patches, d dimensions of an entry, k entries of a codebook.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..ranges import Checked, Depth, Positive, Several, Size, Weight, finite, floats
from .blocks import Downsample, Layer, Level, PixelAttention, ResBlock, Upsample, require_levels

EPS = 1e-6  # epsilon of the GroupNorms in SD's autoencoder


@dataclass(frozen=True)
class AutoencoderConfig(Checked):
    channels: tuple[Size, ...]  # one entry per level, from the finest to the coarsest
    res_blocks: Depth = 2  # residual blocks per level in the encoder; one more in the decoder
    groups: Size = 32  # groups of each GroupNorm
    in_channels: Size = 3  # channels of the pictures
    latent_channels: Size = 4
    scaling_factor: Positive = 1.0  # latents are multiplied by it, so that their std is about 1
    mid_attention: bool = True  # attention between all pixels of the coarsest level
    # mean and std of the unscaled latents, per channel, by which they are normalised; empty = 0 and 1
    mean: tuple[float, ...] = ()
    std: tuple[Positive, ...] = ()

    def require(self) -> None:
        require_levels(self.channels, groups=self.groups)
        if not {len(self.mean), len(self.std)} <= {0, self.latent_channels}:
            raise ValueError(f"mean and std need a number for each of {self.latent_channels} latent channels")

    @property
    def factor(self) -> int:
        """Downsampling factor: pixels per latent position along each side."""
        return 2 ** (len(self.channels) - 1)


# Encodes pictures of 3 x 64 x 64 as latents of 4 x 8 x 8.  2.7 million parameters, most at resolution 8 x 8.
TOY_AUTOENCODER = AutoencoderConfig((16, 32, 64, 128), res_blocks=1, groups=8)
# For pictures of scene graphs, which are flat shapes on a plain background; half the parameters.
FLAT_AUTOENCODER = AutoencoderConfig((16, 32, 64, 96), res_blocks=1, groups=8)


def encoder(config: AutoencoderConfig) -> nn.Sequential:
    """Pictures to features from which `quant_conv` makes the mean and log-variance of the latents.

    Shapes of its layers: conv_in -> (b c0 h w), down and mid -> (b cn h/f w/f), conv_out -> (b 2z h/f w/f)
    """
    first, last = config.channels[0], config.channels[-1]
    start = nn.Conv2d(config.in_channels, first, 3, padding=1)
    down = levels(config.channels, config.res_blocks, lambda c: Downsample(c, pad_all_around=False), config)
    layers = {"conv_in": start, "down": down, "mid": middle(last, config)}
    return nn.Sequential(OrderedDict(layers | ending(last, 2 * config.latent_channels, config.groups)))


def decoder(config: AutoencoderConfig) -> nn.Sequential:
    """Latents to pictures.

    Shapes of its layers: conv_in and mid -> (b cn h/f w/f), up -> (b c0 h w), conv_out -> (b 3 h w)
    """
    first, last = config.channels[-1], config.channels[0]
    start = nn.Conv2d(config.latent_channels, first, 3, padding=1)
    layers = {"conv_in": start, "mid": middle(first, config)}
    layers["up"] = levels(config.channels[::-1], config.res_blocks + 1, Upsample, config)
    return nn.Sequential(OrderedDict(layers | ending(last, config.in_channels, config.groups)))


class Autoencoder(nn.Module):
    """Variational autoencoder.  Pictures are in [-1, 1]; scaled latents have a std of about 1."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = encoder(config)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)
        self.decoder = decoder(config)

    def _mean_and_std(self, like: Tensor) -> Iterator[Tensor]:
        """Mean and std of the unscaled latents by `config`.  -> (z 1 1) or (1 1 1) each"""
        both = self.config.mean or (0.0,), self.config.std or (1.0,)
        return (like.new_tensor(values)[:, None, None] for values in both)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the unscaled latents.

        Shapes: images (b 3 h w) -> (b z h/f w/f), (b z h/f w/f)
        """
        f = self.config.factor
        floats(images, f"b {self.config.in_channels} h w", "images")
        if images.shape[2] % f or images.shape[3] % f:
            raise ValueError(f"pictures of {images.shape[2]} x {images.shape[3]} are not a multiple of {f}")
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # latent-diffusion's bounds: exp stays finite in float32

    def encode(self, images: Tensor) -> Tensor:
        """Scaled latents, the means of their distributions.

        Shapes: images (b 3 h w) -> (b z h/f w/f).  Raises ValueError unless h and w are multiples of f.
        """
        z, _ = self.moments(images)
        mean, std = self._mean_and_std(z)
        return (z - mean) / std * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, nearly in [-1, 1] but not clamped.  Shapes: latents (b z h/f w/f) -> (b 3 h w)"""
        mean, std = self._mean_and_std(latents)
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor * std + mean))


def levels(channels: tuple[int, ...], n: int, resize: Callable, config: AutoencoderConfig) -> nn.Sequential:
    """One level of `n` residual blocks for each entry of `channels`.

    The first level takes `channels[0]` input channels.  All levels but the last end with `resize(channels)`.
    """
    made = nn.Sequential()
    for i, (c, c_out) in enumerate(zip((channels[0], *channels), channels)):
        layers = [Layer(ResBlock(c if j == 0 else c_out, c_out, config.groups, EPS)) for j in range(n)]
        made.append(Level(layers, resize(c_out) if i + 1 < len(channels) else None))
    return made


def middle(channels: int, config: AutoencoderConfig) -> Level:
    """The layers at the coarsest resolution, the only ones with attention."""
    attn = PixelAttention(channels, config.groups, EPS) if config.mid_attention else None
    first, second = (ResBlock(channels, channels, config.groups, EPS) for _ in range(2))
    return Level([Layer(first, attn), Layer(second)])


def ending(c_in: int, c_out: int, groups: int) -> dict[str, nn.Module]:
    """The last layers of encoder and decoder."""
    norm, conv = nn.GroupNorm(groups, c_in, eps=EPS), nn.Conv2d(c_in, c_out, 3, padding=1)
    return {"norm_out": norm, "silu": nn.SiLU(), "conv_out": conv}


# ---------------------------------------------------------------------------------------- pictures as codes
@dataclass(frozen=True)
class VQConfig(Checked):
    latent_channels: Size = 4  # z, of the first autoencoder
    patch: Size = 8  # side of a patch in pixels; the downsampling factor of the first autoencoder
    hidden: Size = 128  # channels of the encoders
    width: Size = 64  # channels of the decoder
    res_blocks: Depth = 2  # residual blocks of the decoder
    groups: Size = 8  # groups of each GroupNorm
    forms: Several = 512  # k, entries of the form codebook
    colors: Several = 256  # k, entries of the colour codebook
    dimensions: Several = 8  # d, dimensions of an entry
    beta: Weight = 0.25  # weight of the commitment loss, as in van den Oord et al.

    def require(self) -> None:
        require_levels((self.width,), groups=self.groups)


class Quantised(NamedTuple):
    vectors: Tensor  # (b d h w) z_q, the nearest entries; gradients pass to z
    ids: Tensor  # (b h w) indices of the entries
    loss: Tensor  # () L_vq, the mean over patches and dimensions
    encodings: Tensor  # (b d h w) z, not normalised


class Quantiser(nn.Module):
    """A codebook of `k` entries with `d` dimensions; `beta` is the weight of the commitment loss."""

    def __init__(self, k: int, d: int, beta: float = VQConfig.beta) -> None:
        super().__init__()
        self.beta = beta
        self.words = nn.Embedding(k, d)  # the entries, before normalisation; saved files use this name
        nn.init.normal_(self.words.weight)

    @property
    def codebook(self) -> Tensor:
        """The entries, of length 1.  -> (k d)"""
        return F.normalize(self.words.weight, dim=-1)

    def forward(self, z: Tensor) -> Quantised:
        """Replace each encoding by its nearest entry.  Shapes: z (b d h w), of any length"""
        unit = F.normalize(z, dim=1)
        rows = rearrange(unit, "b d h w -> b h w d")
        ids = (rows @ self.codebook.T).argmax(-1)  # (b h w); of vectors of length 1, the nearest
        entries = self.vectors(ids)  # (b d h w)
        loss = F.mse_loss(entries, unit.detach()) + self.beta * F.mse_loss(unit, entries.detach())
        return Quantised(unit + (entries - unit).detach(), ids, loss, z)

    def vectors(self, ids: Tensor) -> Tensor:
        """The entries with the given ids.  Shapes: ids (b h w) -> (b d h w)"""
        return rearrange(self.codebook[ids], "b h w d -> b d h w")

    @torch.no_grad()
    def revive(self, z: Tensor, used: Tensor, generator: torch.Generator) -> int:
        """Move unused entries onto encodings that are far from their nearest entry, plus a little noise.

        `used` counts how often each entry was chosen recently.  -> the number of entries that were moved
        Shapes: z (b d h w), used (k)
        """
        dead = (used == 0).nonzero().flatten()  # (m)
        rows = rearrange(F.normalize(z, dim=1), "b d h w -> (b h w) d")
        cosine = (rows @ self.codebook.T).amax(1)  # (b*h*w)
        # sampled in proportion to the squared distance, as k-means++ does: the farthest may all be equal
        chance = (2 - 2 * cosine).clamp(min=1e-6).cpu()
        m = min(len(dead), len(rows))
        if not m:
            return 0
        pick = torch.multinomial(chance, m, generator=generator).to(rows.device)
        noise = torch.randn(m, rows.shape[1], generator=generator).to(rows)
        self.words.weight[dead[:m]] = rows[pick] + 0.02 * noise
        return m


class VQAutoencoder(nn.Module):
    """Encodes each patch of a picture as a form and its colours; decodes these to latents."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        d, c = config.dimensions, config.width
        self.see_form, self.see_color = see_patch(config), see_patch(config)
        self.forms, self.colors = (Quantiser(k, d, config.beta) for k in (config.forms, config.colors))
        blocks = [ResBlock(c, c, config.groups, EPS) for _ in range(config.res_blocks)]
        last = ending(c, config.latent_channels, config.groups).values()
        self.decoder = nn.Sequential(nn.Conv2d(2 * d, c, 3, padding=1), *blocks, *last)

    def forward(self, images: Tensor, twins: Tensor) -> tuple[Tensor, Quantised, Quantised]:
        """Reconstruct latents from the colours of the pictures and the forms of their twins.

        Shapes: images, twins (b 3 8h 8w) -> latents (b z h w), forms, colours
        """
        form, color = self.forms(self.see_form(twins)), self.colors(self.see_color(images))
        return self.decoder(torch.cat([form.vectors, color.vectors], 1)), form, color

    def encode(self, images: Tensor) -> Tensor:
        """Pictures to codes, form * colors + color.  Shapes: images (b 3 8h 8w) -> (b h w)"""
        form, color = self.forms(self.see_form(images)).ids, self.colors(self.see_color(images)).ids
        return form * self.config.colors + color

    def decode(self, codes: Tensor) -> Tensor:
        """Codes to latents.  Raises ValueError on an unknown code.  Shapes: codes (b h w) -> (b z h w)"""
        n = self.config.forms * self.config.colors
        if ((codes < 0) | (codes >= n)).any():  # waits only once for a GPU
            raise ValueError(f"image tokens must be in [0, {n}), got {codes.min()} to {codes.max()}")
        form, color = codes // self.config.colors, codes % self.config.colors
        return self.decoder(torch.cat([self.forms.vectors(form), self.colors.vectors(color)], 1))


class Codec(NamedTuple):
    """Pictures in [-1, 1] to codes, and codes through latents back to pictures."""

    autoencoder: Autoencoder
    vq: VQAutoencoder

    def to(self, device: torch.device | str) -> "Codec":
        return Codec(self.autoencoder.to(device), self.vq.to(device))

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """The code of each patch, row by row.  Shapes: images (b 3 8h 8w) -> (b h*w)"""
        return self.vq.encode(images).flatten(1)

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> Tensor:
        """Square pictures in [-1, 1].  Raises FloatingPointError when a pixel is not finite.

        Shapes: codes (b n), n = h^2 -> (b 3 8h 8h)
        """
        side = math.isqrt(codes.shape[1])
        images = self.autoencoder.decode(self.vq.decode(codes.view(-1, side, side)))
        return finite(images, "a picture").clamp(-1, 1)


def see_patch(config: VQConfig) -> nn.Sequential:
    """An encoder that processes each patch separately.  (b 3 8h 8w) -> (b d h w)"""
    m = config.hidden
    first = nn.Conv2d(3, m, config.patch, stride=config.patch)
    return nn.Sequential(first, nn.SiLU(), nn.Conv2d(m, m, 1), nn.SiLU(), nn.Conv2d(m, config.dimensions, 1))
