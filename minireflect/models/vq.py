"""Pictures to words of a codebook and back: a vector-quantised autoencoder, whose pictures a transformer can write token by token.

    z_q = e_k,   k = argmin_j |z - e_j|             van den Oord et al. 2017, "Neural Discrete Representation Learning", equations 1 and 2
    z_q = z + sg[z_q - z]                           the gradient of the decoder passes straight through the choice
    L_vq = |sg[z] - e_k|^2 + beta |z - sg[e_k]|^2   equation 3, the second and third term

Codes and codewords have length 1 and few dimensions (Yu et al. 2022, arXiv 2110.04627, section 3.2; LlamaGen and Janus, on which
ReasonGen-R1 builds, do the same): nearest is then most alike, and nearly all codewords find use.  Those that do not are
moved onto codes that are badly served (`revive`), as in Jukebox (Dhariwal et al. 2020, section 3.1).

A patch of 8x8 pixels is two words: a form and then its colours, each of a codebook of its own.  What is learnt of a form, where it stands and what follows
it, is then known in every colour.  While training, the form is read off a twin of the picture, the same scene in other colours, so that it says as little as can be of these.
As one number a patch is  form * colours + colour.

Words are chosen by the patch and by nothing around it: the encoders are networks over the patch alone.  The same patch is then the same words
in every picture, which a model needs that shall draw combinations of things it has never seen together.  (Words of the autoencoder's latents are not
so: it normalises over the whole picture, and of patches equal in every pixel a third got the same word.)  The decoder sees all words together, and makes
latents of the autoencoder, whose decoder draws.

Shapes: b batch, c h w pictures in pixels or in patches, z latent channels, d dimensions of a codeword, k size of a codebook.
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
    hidden: int = 128  # channels of the encoders
    width: int = 64  # channels of the decoder
    res_blocks: int = 2  # of the decoder
    groups: int = 8  # of every GroupNorm
    forms: int = 512  # k, words of the first codebook
    colors: int = 256  # k, words of the second
    dimensions: int = 8  # d, of a codeword
    beta: float = 0.25  # weight of the commitment, van den Oord's

    def __post_init__(self) -> None:
        if min(self.forms, self.colors, self.dimensions) < 2:
            raise ValueError(
                f"{self.forms} forms and {self.colors} colours of {self.dimensions} dimensions: all must be 2 or more"
            )
        if self.width % self.groups:
            raise ValueError(f"width {self.width} is not a multiple of groups {self.groups}")

    @property
    def codes(self) -> int:
        """How many different patches there are."""
        return self.forms * self.colors


class Quantised(NamedTuple):
    vectors: Tensor  # (b d h w) the codewords, with the gradient of the codes
    ids: Tensor  # (b h w) which they are
    loss: Tensor  # () L_vq, a mean over codes and dimensions


class Quantiser(nn.Module):
    """A codebook of k words with d dimensions; beta is the weight of the commitment."""

    def __init__(self, k: int, d: int, beta: float = VQConfig.beta) -> None:
        super().__init__()
        self.beta = beta
        self.words = nn.Embedding(k, d)
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
        loss = F.mse_loss(chosen, z.detach()) + self.beta * F.mse_loss(z, chosen.detach())
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


class Chosen(NamedTuple):
    """What a picture is in words."""

    form: Quantised
    color: Quantised

    @property
    def loss(self) -> Tensor:
        return self.form.loss + self.color.loss


class VQAutoencoder(nn.Module):
    """Patches of a picture to forms and colours, and these to latents."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.see_form, self.see_color = see_patch(config), see_patch(config)
        self.forms = Quantiser(config.forms, config.dimensions, config.beta)
        self.colors = Quantiser(config.colors, config.dimensions, config.beta)
        self.decoder = stack(2 * config.dimensions, config.latent_channels, config)

    def forward(self, images: Tensor, twins: Tensor) -> tuple[Tensor, Chosen, tuple[Tensor, Tensor]]:
        """Latents of the pictures from the colours of these and the forms of their twins.

        Shapes: images, twins (b 3 8h 8w) -> (b z h w) latents after quantisation, what was chosen, twice (b d h w) the codes before
        """
        codes = self.see_form(twins), self.see_color(images)
        found = Chosen(self.forms(codes[0]), self.colors(codes[1]))
        return self.decoder(torch.cat([found.form.vectors, found.color.vectors], 1)), found, codes

    def encode(self, images: Tensor) -> Tensor:
        """Form and colours as one number.  Shapes: images (b 3 8h 8w) -> (b h w)"""
        form, color = self.forms(self.see_form(images)).ids, self.colors(self.see_color(images)).ids
        return form * self.config.colors + color

    def decode(self, ids: Tensor) -> Tensor:
        """Latents.  Raises ValueError on an id that the codebooks do not have.  Shapes: ids (b h w) -> (b z h w)"""
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < self.config.codes):
            raise ValueError(
                f"token ids from {int(ids.min())} to {int(ids.max())}, but the codebooks have {self.config.codes}"
            )
        form, color = ids // self.config.colors, ids % self.config.colors
        return self.decoder(torch.cat([self.forms.vectors(form), self.colors.vectors(color)], 1))


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


def see_patch(config: VQConfig) -> nn.Sequential:
    """An encoder of patches, each by itself.  (b 3 8h 8w) -> (b d h w)"""
    m = config.hidden
    return nn.Sequential(
        nn.Conv2d(3, m, config.patch, stride=config.patch),
        *(nn.SiLU(), nn.Conv2d(m, m, 1)),
        *(nn.SiLU(), nn.Conv2d(m, config.dimensions, 1)),
    )


def stack(c_in: int, c_out: int, config: VQConfig) -> nn.Sequential:
    """Residual blocks between two convolutions; each sees its surroundings."""
    c = config.width
    blocks = [ResBlock(c, c, config.groups, EPS) for _ in range(config.res_blocks)]
    last = nn.GroupNorm(config.groups, c, eps=EPS), nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1)
    return nn.Sequential(nn.Conv2d(c_in, c, 3, padding=1), *blocks, *last)
