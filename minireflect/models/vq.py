"""Pictures to words of a codebook and back: a vector-quantised autoencoder, whose pictures a transformer can write token by token.

    z_q = e_k,   k = argmin_j |z - e_j|             van den Oord et al. 2017, "Neural Discrete Representation Learning", equations 1 and 2
    z_q = z + sg[z_q - z]                           the gradient of the decoder passes straight through the choice
    L_vq = |sg[z] - e_k|^2 + beta |z - sg[e_k]|^2   equation 3, the second and third term

Codes and codewords have length 1 and few dimensions (Yu et al. 2022, arXiv 2110.04627, section 3.2; LlamaGen and Janus, on which
ReasonGen-R1 builds, do the same): nearest is then most alike, and nearly all codewords find use.  Those that do not are
moved onto codes that are badly served (`revive`), as in Jukebox (Dhariwal et al. 2020, section 3.1).

A word is chosen by one patch of 8x8 pixels and by nothing around it: the encoder is a network over the patch alone.  The same patch is then the same word
in every picture, which a model needs that shall draw combinations of things it has never seen together.  (Words of the autoencoder's latents are not
so: it normalises over the whole picture, and of patches equal in every pixel a third got the same word.)  The decoder sees all words together, and makes
latents of the autoencoder, whose decoder draws.

Shapes: b batch, c h w pictures in pixels or in patches, z latent channels, d dimensions of a codeword, k size of the codebook.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .autoencoder import EPS, Autoencoder
from .blocks import ResBlock


@dataclass(frozen=True)
class VQConfig:
    latent_channels: int = 4  # z, of the autoencoder
    patch: int = 8  # pixels to a side; what the autoencoder makes one latent pixel of
    hidden: int = 128  # channels of the encoder
    width: int = 64  # channels of the decoder
    res_blocks: int = 2  # of the decoder
    groups: int = 8  # of every GroupNorm
    codes: int = 1024  # k, words of the codebook
    dimensions: int = 8  # d, of a codeword
    beta: float = 0.25  # weight of the commitment, van den Oord's

    def __post_init__(self) -> None:
        if self.codes < 2 or self.dimensions < 2:
            raise ValueError(f"{self.codes} codes of {self.dimensions} dimensions: both must be 2 or more")
        if self.width % self.groups:
            raise ValueError(f"width {self.width} is not a multiple of groups {self.groups}")


class Quantised(NamedTuple):
    vectors: Tensor  # (b d h w) the codewords, with the gradient of the codes
    ids: Tensor  # (b h w) which they are
    loss: Tensor  # () L_vq, a mean over codes and dimensions


class Quantiser(nn.Module):
    """The codebook."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.codes, config.dimensions)
        nn.init.normal_(self.words.weight)

    @property
    def codebook(self) -> Tensor:
        """-> (k d), each of length 1"""
        return F.normalize(self.words.weight, dim=-1)

    def forward(self, z: Tensor) -> Quantised:
        """Shapes: z (b d h w)"""
        z = F.normalize(z, dim=1)
        rows = rearrange(z, "b d h w -> b h w d")
        ids = (rows @ self.codebook.T).argmax(-1)  # (b h w); of length 1, the most alike is the nearest
        chosen = self.vectors(ids)  # (b d h w)
        loss = F.mse_loss(chosen, z.detach()) + self.config.beta * F.mse_loss(z, chosen.detach())
        return Quantised(z + (chosen - z).detach(), ids, loss)

    def vectors(self, ids: Tensor) -> Tensor:
        """Shapes: ids (b h w) -> (b d h w)"""
        return rearrange(self.codebook[ids], "b h w d -> b d h w")

    @torch.no_grad()
    def revive(self, z: Tensor, used: Tensor, generator: torch.Generator) -> int:
        """Move the codewords that nobody used onto the codes that are farthest from theirs, with a little noise.  -> how many

        Shapes: z (b d h w), used (k) how often each was chosen lately
        """
        dead = (used == 0).nonzero().flatten()  # (m)
        rows = rearrange(F.normalize(z, dim=1), "b d h w -> (b h w) d")
        likeness = (rows @ self.codebook.T).amax(1)  # (b*h*w)
        # not the farthest only, which may all be alike: drawn in proportion to the squared distance, as k-means++ begins
        chance = (2 - 2 * likeness).clamp(min=1e-6).cpu()
        m = min(len(dead), len(rows))
        if not m:
            return 0
        pick = torch.multinomial(chance, m, generator=generator).to(rows.device)
        noise = torch.randn(m, rows.shape[1], generator=generator).to(rows)
        self.words.weight[dead[:m]] = rows[pick] + 0.02 * noise
        return m


class VQAutoencoder(nn.Module):
    """Patches of a picture to words, and these to latents."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        m, d = config.hidden, config.dimensions
        self.encoder = nn.Sequential(
            nn.Conv2d(3, m, config.patch, stride=config.patch),
            *(nn.SiLU(), nn.Conv2d(m, m, 1)),
            *(nn.SiLU(), nn.Conv2d(m, d, 1)),
        )
        self.quantiser = Quantiser(config)
        self.decoder = stack(config.dimensions, config.latent_channels, config)

    def forward(self, images: Tensor) -> tuple[Tensor, Quantised, Tensor]:
        """Shapes: images (b 3 8h 8w) -> (b z h w) latents after quantisation, what was chosen, (b d h w) the codes before"""
        codes = self.encoder(images)
        found = self.quantiser(codes)
        return self.decoder(found.vectors), found, codes

    def encode(self, images: Tensor) -> Tensor:
        """Word ids.  Shapes: images (b 3 8h 8w) -> (b h w)"""
        return self.quantiser(self.encoder(images)).ids

    def decode(self, ids: Tensor) -> Tensor:
        """Latents.  Raises ValueError on an id that the codebook does not have.  Shapes: ids (b h w) -> (b z h w)"""
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < self.config.codes):
            raise ValueError(
                f"token ids from {int(ids.min())} to {int(ids.max())}, but the codebook has {self.config.codes}"
            )
        return self.decoder(self.quantiser.vectors(ids))


class Codec(NamedTuple):
    """Pictures in [-1, 1] to words, and by way of the autoencoder's latents back."""

    autoencoder: Autoencoder
    vq: VQAutoencoder

    def to(self, device: torch.device | str) -> "Codec":
        return Codec(self.autoencoder.to(device), self.vq.to(device))

    @torch.no_grad()
    def words(self, images: Tensor) -> Tensor:
        """Row by row.  Shapes: images (b 3 64 64) -> (b 64)"""
        return self.vq.encode(images).flatten(1)

    @torch.no_grad()
    def pictures(self, words: Tensor) -> Tensor:
        """Shapes: words (b n), n the square of a side -> (b 3 h w)"""
        side = math.isqrt(words.shape[1])
        return self.autoencoder.decode(self.vq.decode(words.view(-1, side, side))).clamp(-1, 1)


def stack(c_in: int, c_out: int, config: VQConfig) -> nn.Sequential:
    """Residual blocks between two convolutions; each sees its surroundings."""
    c = config.width
    blocks = [ResBlock(c, c, config.groups, EPS) for _ in range(config.res_blocks)]
    last = nn.GroupNorm(config.groups, c, eps=EPS), nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1)
    return nn.Sequential(nn.Conv2d(c_in, c, 3, padding=1), *blocks, *last)
