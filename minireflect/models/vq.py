"""Pictures to words of a codebook and back: a vector-quantised autoencoder, whose pictures a transformer can write token by token.

    z_q = e_k,   k = argmin_j |z - e_j|             van den Oord et al. 2017, "Neural Discrete Representation Learning", equations 1 and 2
    z_q = z + sg[z_q - z]                           the gradient of the decoder passes straight through the choice
    L_vq = |sg[z] - e_k|^2 + beta |z - sg[e_k]|^2   equation 3, the second and third term

Codes and codewords have length 1 and few dimensions (Yu et al. 2022, arXiv 2110.04627, section 3.2; LlamaGen and Janus, on which
ReasonGen-R1 builds, do the same): nearest is then most alike, and nearly all codewords find use.  Those that do not are
moved onto codes that are badly served (`revive`), as in Jukebox (Dhariwal et al. 2020, section 3.1).

Encoder and decoder are those of autoencoder.py.
Shapes: b batch, h w space in pixels, f the factor in resolution, d dimensions of a codeword, k size of the codebook.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .autoencoder import AutoencoderConfig, Decoder, Encoder


@dataclass(frozen=True)
class VQConfig:
    channels: tuple[int, ...] = (
        16,
        32,
        64,
        128,
    )  # one entry per level; four make an eighth of the resolution
    res_blocks: int = 1
    groups: int = 8
    codes: int = 1024  # k, words of the codebook
    dimensions: int = 8  # d, of a codeword
    beta: float = 0.25  # weight of the commitment, van den Oord's

    def __post_init__(self) -> None:
        if self.codes < 2 or self.dimensions < 2:
            raise ValueError(f"{self.codes} codes of {self.dimensions} dimensions: both must be 2 or more")

    @property
    def networks(self) -> AutoencoderConfig:
        """Encoder and decoder."""
        return AutoencoderConfig(self.channels, self.res_blocks, self.groups, latent_channels=self.dimensions)

    @property
    def factor(self) -> int:
        """Pixels per token, along each side."""
        return self.networks.factor


class Quantised(NamedTuple):
    vectors: Tensor  # (b d h/f w/f) the codewords, with the gradient of the codes
    ids: Tensor  # (b h/f w/f) which they are
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
        ids = (rows @ self.codebook.T).argmax(
            -1
        )  # (b h w); of vectors of length 1 the most alike is the nearest
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
    """Pictures in [-1, 1] and their tokens."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        d = config.dimensions
        self.encoder = Encoder(config.networks)
        self.quant_conv = nn.Conv2d(2 * d, d, 1)
        self.quantiser = Quantiser(config)
        self.post_quant_conv = nn.Conv2d(d, d, 1)
        self.decoder = Decoder(config.networks)

    def codes(self, images: Tensor) -> Tensor:
        """What is quantised, before it is.  Shapes: images (b 3 h w) -> (b d h/f w/f)"""
        f = self.config.factor
        if images.shape[2] % f or images.shape[3] % f:
            raise ValueError(f"pictures of {images.shape[2]} x {images.shape[3]} are not a multiple of {f}")
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> Tensor:
        """Token ids.  Shapes: images (b 3 h w) -> (b h/f w/f)"""
        return self.quantiser(self.codes(images)).ids

    def decode(self, ids: Tensor) -> Tensor:
        """Pictures, about in [-1, 1] but not clamped.  Raises ValueError on an id that the codebook does not have.

        Shapes: ids (b h/f w/f) -> (b 3 h w)
        """
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < self.config.codes):
            raise ValueError(
                f"token ids from {int(ids.min())} to {int(ids.max())}, but the codebook has {self.config.codes}"
            )
        return self.draw(self.quantiser.vectors(ids))

    def draw(self, vectors: Tensor) -> Tensor:
        """Shapes: vectors (b d h/f w/f) -> (b 3 h w)"""
        return self.decoder(self.post_quant_conv(vectors))
