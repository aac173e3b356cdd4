"""Pictures to codebook entries and back: a vector-quantised autoencoder, for pictures written as tokens.

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

Shapes: b batch, c h w pictures in pixels or in patches, z latent channels, d dimensions of an entry, k size
of a codebook.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..ranges import Checked, Depth, Range, Size, Weight
from .autoencoder import EPS, Autoencoder, ending
from .blocks import ResBlock, require_multiple

Several = Annotated[int, Range(2)]


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

    def __post_init__(self) -> None:
        super().__post_init__()
        require_multiple("width", self.width, "groups", self.groups)

    @property
    def codes(self) -> int:
        """How many different codes there are."""
        return self.forms * self.colors


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
        # the farthest alone may be all alike: sampled by squared distance, as k-means++ begins
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
        blocks = [ResBlock(c, c, config.groups, EPS) for _ in range(config.res_blocks)]  # see around them
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
        if len(codes) and not 0 <= codes.min() <= codes.max() < (n := self.config.codes):
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
        """Shapes: codes (b n), n the square of a side -> (b 3 h w)"""
        side = math.isqrt(codes.shape[1])
        return self.autoencoder.decode(self.vq.decode(codes.view(-1, side, side))).clamp(-1, 1)


def see_patch(config: VQConfig) -> nn.Sequential:
    """An encoder of patches, each by itself.  (b 3 8h 8w) -> (b d h w)"""
    m = config.hidden
    first = nn.Conv2d(3, m, config.patch, stride=config.patch)
    return nn.Sequential(first, nn.SiLU(), nn.Conv2d(m, m, 1), nn.SiLU(), nn.Conv2d(m, config.dimensions, 1))
