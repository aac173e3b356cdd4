"""Pictures to latents and back, from a toy to the real size of Stable Diffusion; and to codes and back.

    Rombach et al. 2022, "Latent Diffusion", section 3.1 and appendix G
    Kingma & Welling 2014, "Auto-Encoding Variational Bayes", for the Gaussian code

    encode:  images -> mean, logvar of a Gaussian per latent -> a sample (or the mean), times scaling_factor
    decode:  latents / scaling_factor -> images

Differs from the references: residual branches start at zero (see blocks.py).

The vector-quantised autoencoder of ReasonGen-R1, for pictures written as tokens:

    z_q = e_k,   k = argmin_j |z - e_j|             van den Oord et al. 2017, arXiv 1711.00937, equations 1, 2
    z_q = z + sg[z_q - z]                           the decoder's gradient passes straight through the choice
    L_vq = |sg[z] - e_k|^2 + beta |z - sg[e_k]|^2   equation 3, the second and third term

Encodings and entries have length 1 and few dimensions (Yu et al. 2022, arXiv 2110.04627, section 3.2;
LlamaGen and Janus, on which ReasonGen-R1 builds, do the same): the nearest entry is then the one with the
largest cosine, and nearly all entries are used.  Unused ones are moved onto encodings that are far from their
entry (`revive`), as in Jukebox (Dhariwal et al. 2020, section 3.1).

A patch of 8x8 pixels is two entries, a form and its colours, each of a codebook of its own: what is learnt of
a form, and of where it occurs, then holds in every colour.  In training the form is read from a twin of the
picture, the same scene in other colours, so that it carries as little of them as possible.  As one number, a
code, a patch is  form * colours + colour.

The encoders see one patch at a time: the same patch gets the same code in every picture, which a model needs
to draw combinations that it has never seen.  (Codes of the autoencoder's latents lack this: it normalises
over the whole picture, and a third of the patches that were equal in every pixel got other codes.)  The
decoder sees all codes together and makes latents of the autoencoder, whose decoder makes pixels.

Shapes: b batch, c h w space in pixels, z latent channels, f = 2^(levels - 1) the factor in resolution; d
dimensions of an entry, k size of a codebook, and of its encodings h w in patches.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..ranges import Checked, Depth, Positive, Several, Size, Weight, finite
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
    std: tuple[Positive, ...] = ()

    def require(self) -> None:
        require_levels(self.channels, groups=self.groups)
        if not {len(self.mean), len(self.std)} <= {0, self.latent_channels}:
            raise ValueError(f"mean and std need a number for each of {self.latent_channels} latent channels")

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


# ---------------------------------------------------------------------------------------- pictures as codes
@dataclass(frozen=True)
class VQConfig(Checked):
    latent_channels: Size = 4  # z, of the autoencoder
    patch: Size = 8  # pixels to a side; the autoencoder makes one latent pixel of them
    hidden: Size = 128  # channels of the encoders
    width: Size = 64  # channels of the decoder
    res_blocks: Depth = 2  # of the decoder
    groups: Size = 8  # of every GroupNorm
    forms: Several = 512  # k, entries of the first codebook
    colors: Several = 256  # k, entries of the second
    dimensions: Several = 8  # d, of an entry
    beta: Weight = 0.25  # weight of the commitment, van den Oord's

    def require(self) -> None:
        require_levels((self.width,), groups=self.groups)


class Quantised(NamedTuple):
    vectors: Tensor  # (b d h w) the entries, with the gradient of the encodings
    ids: Tensor  # (b h w) their numbers
    loss: Tensor  # () L_vq, a mean over patches and dimensions


class Quantiser(nn.Module):
    """A codebook of k entries with d dimensions; beta is the weight of the commitment."""

    def __init__(self, k: int, d: int, beta: float = VQConfig.beta) -> None:
        super().__init__()
        self.beta = beta
        self.words = nn.Embedding(k, d)  # the entries; saved weights know them by this name
        nn.init.normal_(self.words.weight)

    @property
    def codebook(self) -> Tensor:
        """-> (k d), each of length 1"""
        return F.normalize(self.words.weight, dim=-1)

    def forward(self, z: Tensor) -> Quantised:
        """Shapes: z (b d h w)"""
        z = F.normalize(z, dim=1)
        rows = rearrange(z, "b d h w -> b h w d")
        ids = (rows @ self.codebook.T).argmax(-1)  # (b h w); at length 1 the largest cosine is the nearest
        entries = self.vectors(ids)  # (b d h w)
        loss = F.mse_loss(entries, z.detach()) + self.beta * F.mse_loss(z, entries.detach())
        return Quantised(z + (entries - z).detach(), ids, loss)

    def vectors(self, ids: Tensor) -> Tensor:
        """Shapes: ids (b h w) -> (b d h w)"""
        return rearrange(self.codebook[ids], "b h w d -> b d h w")

    @torch.no_grad()
    def revive(self, z: Tensor, used: Tensor, generator: torch.Generator) -> int:
        """Move unused entries onto encodings far from theirs, with a little noise.  -> how many were moved

        Shapes: z (b d h w), used (k) how often each entry was chosen lately
        """
        dead = (used == 0).nonzero().flatten()  # (m)
        rows = rearrange(F.normalize(z, dim=1), "b d h w -> (b h w) d")
        cosine = (rows @ self.codebook.T).amax(1)  # (b*h*w)
        # drawn by squared distance, as k-means++ begins: the farthest alone may all be equal
        chance = (2 - 2 * cosine).clamp(min=1e-6).cpu()
        m = min(len(dead), len(rows))
        if not m:
            return 0
        pick = torch.multinomial(chance, m, generator=generator).to(rows.device)
        noise = torch.randn(m, rows.shape[1], generator=generator).to(rows)
        self.words.weight[dead[:m]] = rows[pick] + 0.02 * noise
        return m


class FormAndColor(NamedTuple):
    """The two entries of every patch."""

    form: Quantised
    color: Quantised


class VQAutoencoder(nn.Module):
    """Patches of a picture to forms and colours, and these to latents."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.see_form, self.see_color = see_patch(config), see_patch(config)
        d, c = config.dimensions, config.width
        self.forms, self.colors = (Quantiser(k, d, config.beta) for k in (config.forms, config.colors))
        blocks = [ResBlock(c, c, config.groups, EPS) for _ in range(config.res_blocks)]  # see neighbours
        last = ending(c, config.latent_channels, config.groups).values()
        self.decoder = nn.Sequential(nn.Conv2d(2 * d, c, 3, padding=1), *blocks, *last)

    def forward(self, images: Tensor, twins: Tensor) -> tuple[Tensor, FormAndColor, tuple[Tensor, Tensor]]:
        """Latents from the colours of the pictures and the forms of their twins.

        Shapes: images, twins (b 3 8h 8w) -> (b z h w) latents, the entries, and the encodings before
        quantisation, (b d h w) each
        """
        z = self.see_form(twins), self.see_color(images)
        found = FormAndColor(self.forms(z[0]), self.colors(z[1]))
        return self.decoder(torch.cat([found.form.vectors, found.color.vectors], 1)), found, z

    def encode(self, images: Tensor) -> Tensor:
        """Codes.  Shapes: images (b 3 8h 8w) -> (b h w)"""
        form, color = self.forms(self.see_form(images)).ids, self.colors(self.see_color(images)).ids
        return form * self.config.colors + color

    def decode(self, codes: Tensor) -> Tensor:
        """Latents.  Raises ValueError on an unknown code.  Shapes: codes (b h w) -> (b z h w)"""
        if len(codes) and not 0 <= codes.min() <= codes.max() < (n := self.config.forms * self.config.colors):
            raise ValueError(f"image tokens from {codes.min()} to {codes.max()}, but the codebooks have {n}")
        form, color = codes // self.config.colors, codes % self.config.colors
        return self.decoder(torch.cat([self.forms.vectors(form), self.colors.vectors(color)], 1))


class Codec(NamedTuple):
    """Pictures in [-1, 1] to codes and, through the autoencoder's latents, back."""

    autoencoder: Autoencoder
    vq: VQAutoencoder

    def to(self, device: torch.device | str) -> "Codec":
        return Codec(self.autoencoder.to(device), self.vq.to(device))

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """Row by row.  Shapes: images (b 3 64 64) -> (b 64)"""
        return self.vq.encode(images).flatten(1)

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> Tensor:
        """Shapes: codes (b n), n the square of a side -> (b 3 h w).  Raises as `LatentDiffusion.decode`."""
        side = math.isqrt(codes.shape[1])
        images = self.autoencoder.decode(self.vq.decode(codes.view(-1, side, side)))
        return finite(images, "a picture").clamp(-1, 1)


def see_patch(config: VQConfig) -> nn.Sequential:
    """An encoder of patches, each by itself.  (b 3 8h 8w) -> (b d h w)"""
    m = config.hidden
    first = nn.Conv2d(3, m, config.patch, stride=config.patch)
    return nn.Sequential(first, nn.SiLU(), nn.Conv2d(m, m, 1), nn.SiLU(), nn.Conv2d(m, config.dimensions, 1))
