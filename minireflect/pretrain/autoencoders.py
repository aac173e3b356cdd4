"""Train the two autoencoders of models/autoencoder.py.

    autoencoder     64x64x3 pixels -> 8x8x4 latents -> pixels            Rombach et al. 2022
        L = |x' - x| + (x' - x)^2 + kl KL(q(z|x) || N(0, I))

    vq              64x64x3 pixels -> 8x8 forms and colours -> latents   van den Oord et al. 2017
        L = mean(w (z' - z)^2) + L_vq

There is no adversarial and no perceptual loss.  For vq, each scene is rendered twice; the second picture, the
twin, has other colours.  Each picture is reconstructed from its own colours and from the forms of its twin,
which separates form from colour.  The patches in which twins differ show objects.  They get a larger weight
w, because small objects would otherwise hardly affect the loss; w is 1 on average.  With a loss on decoded
pixels instead of latents, training was three times slower.

    python train.py autoencoder | vq
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..models.autoencoder import Autoencoder, AutoencoderConfig, VQAutoencoder, VQConfig
from ..ranges import Count, Several, Weight
from ..run import Job
from ..streams import rng
from ..training import Training, optimise
from ..world.canvas import to_tensor

OBJECT_WEIGHT = 5.0  # vq: loss weight of a patch with an object, relative to one without
# vq: number of times that unused entries are counted in a training; in its first half they are also revived
REVIVALS = 120


@torch.no_grad()
def encode_all(encode: Callable[[Tensor], Tensor], pixels: np.ndarray, device: torch.device) -> Tensor:
    """Encode all pictures in batches of about 256.  Shapes: pixels (n 64 64 3) uint8 -> (n ...)"""
    parts = tqdm(np.array_split(pixels, max(1, len(pixels) // 256)), "encoding", unit="batch", leave=False)
    return torch.cat([encode(to_tensor(part).to(device)) for part in parts])


@dataclass(frozen=True)
class AutoencoderTraining(Training):
    # weight of the KL term, which is in nats per latent dimension
    kl: Weight = 3e-4
    # largest std of noise added to the latents, in units of their std; makes the decoder robust
    noise: Weight = 0.0


AUTOENCODER_TRAINING = AutoencoderTraining(20_000, steps=2_500, batch=16, lr=2e-3)


def train_autoencoder(
    config: AutoencoderTraining, network: AutoencoderConfig, pixels: np.ndarray, job: Job
) -> Autoencoder:
    """Train an autoencoder on pictures, and set `scaling_factor` so that latents have a std of 1.

    The factor is kept if scripts/shipped.py has frozen the encoder.
    Shapes: pixels (n 64 64 3) uint8
    """
    torch.manual_seed(job.seed)  # torch initialises weights from its global generator
    model = Autoencoder(network).to(job.device, memory_format=torch.channels_last)
    for step, generator, minimise in optimise("autoencoder", config, {"autoencoder": model}, job, decay=1e-4):
        pick = torch.randint(len(pixels), (config.batch,), generator=generator)
        images = to_tensor(pixels[pick.numpy()]).to(job.device)  # (b 3 64 64)
        mean, logvar = model.moments(images)  # (b 4 8 8)
        generator = rng(job.seed, "autoencoder", "noise", step)
        noise = torch.randn(mean.shape, generator=generator).to(job.device)  # (b 4 8 8)
        std = (logvar / 2).exp()
        if config.noise:
            largest = config.noise / model.config.scaling_factor
            added = largest * torch.rand(len(mean), 1, 1, 1, generator=generator).to(job.device)
            std = (std**2 + added**2).sqrt()
        error = model.decoder(model.post_quant_conv(mean + std * noise)) - images  # (b 3 64 64)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()  # Kingma & Welling (10), nats per dimension
        mse = (error**2).mean()
        minimise(error.abs().mean() + mse + config.kl * kl, mse=mse.item(), kl=kl.item())
    if model.quant_conv.weight.requires_grad:
        means = [model.moments(to_tensor(x).to(job.device))[0] for x in np.array_split(pixels[:1024], 8)]
        model.config = replace(model.config, scaling_factor=1 / torch.cat(means).std().item())
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class VQTraining(Training):
    # pictures, rendered once; half of them are twins of the others
    pictures: Several = 30_000
    # entries of the form codebook
    forms: Count = 512
    # entries of the colour codebook
    colors: Count = 256

    def require(self) -> None:
        if self.batch % 2:
            raise ValueError(f"batch must be even, as each picture comes with its twin, got {self.batch}")


VQ_TRAINING = VQTraining(steps=6_000, batch=128, lr=2e-3)


def train_vq(
    config: VQTraining, pixels: np.ndarray, twins: np.ndarray, autoencoder: Autoencoder, job: Job
) -> VQAutoencoder:
    """Train a vector-quantised autoencoder on pictures and their twins.

    Shapes: pixels, twins (n 64 64 3) uint8
    """
    seed, device, every = job.seed, job.device, max(1, config.steps // REVIVALS)
    torch.manual_seed(seed)
    n, both = len(pixels), np.concatenate([pixels, twins])
    latents = encode_all(autoencoder.to(device).encode, both, device)  # (2n z 8 8)
    model = VQAutoencoder(VQConfig(latents.shape[1], forms=config.forms, colors=config.colors)).to(device)
    books = {"forms": model.forms, "colors": model.colors}
    counts = nn.Module()  # how often each entry was used lately; a module, so that the run saves it
    for name, book in books.items():
        counts.register_buffer(name, torch.zeros(len(book.codebook), device=device))  # (k)
    for step, generator, minimise in optimise("vq", config, {"vq": model, "seen": counts}, job, decay=1e-4):
        pick = torch.randint(n, (config.batch // 2,), generator=generator)
        pick = torch.cat([pick, pick + n])  # (b) pictures, then their twins
        images = to_tensor(both[pick.numpy()]).to(device)  # (b 3 64 64)
        twin = images.roll(config.batch // 2, 0)  # (b 3 64 64)
        out, *chosen = model(images, twin)  # (b z 8 8); forms, colours
        error = (out - latents[pick]) ** 2  # (b z 8 8)
        values = {"latents": error.mean().item()}
        for (name, used), quantised in zip(counts.named_buffers(), chosen):
            used += torch.bincount(quantised.ids.flatten(), minlength=len(used))
            if (step + 1) % every == 0:
                values[f"{name}_used"] = (used > 0).float().mean().item()
                values[f"{name}_perplexity"] = perplexity(used)
        weights = patch_weights(images, twin, OBJECT_WEIGHT)  # (b 1 8 8)
        minimise((weights * error).mean() + sum(quantised.loss for quantised in chosen), **values)
        if (step + 1) % every == 0:
            for (name, used), quantised in zip(counts.named_buffers(), chosen):
                if 2 * step < config.steps:
                    books[name].revive(quantised.encodings, used, rng(seed, "vq", "revive", name, step))
                used.zero_()
    return model.eval().requires_grad_(False)


def patch_weights(images: Tensor, twins: Tensor, weight: float) -> Tensor:
    """Loss weight of each patch: `weight` times larger where picture and twin differ, and 1 on average.

    Shapes: images, twins (b 3 8h 8w) -> (b 1 h w)
    """
    differ = F.max_pool2d((images - twins).abs().amax(1, keepdim=True), 8) > 0.1  # pixels are in [-1, 1]
    value = torch.where(differ, weight, 1.0)
    return value / value.mean()


def perplexity(used: Tensor) -> float:
    """exp(entropy) of the use of entries: k if all are used equally often.  Shapes: used (k) counts"""
    return torch.special.entr(used / used.sum().clamp(min=1)).sum().exp().item()
