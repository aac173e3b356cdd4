"""Train the autoencoder on pictures of a world:  64x64x3 -> 8x8x4.

    L = |x' - x| + (x' - x)^2 + kl KL(q(z|x) || N(0, I))

Rombach et al. 2022 without the adversarial and the perceptual loss.

    python train.py autoencoder
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..models.autoencoder import Autoencoder, AutoencoderConfig
from ..ranges import Count, Weight
from ..run import Job
from ..streams import rng
from ..world.canvas import to_tensor
from .optimise import Training, optimise


@dataclass(frozen=True)
class AutoencoderTraining(Training):
    # pictures, rendered once
    pictures: Count = 20_000
    # optimiser steps
    steps: Count = 2_500
    # pictures a step
    batch: Count = 16
    # peak learning rate of AdamW; cosine to zero after a warm-up of 5 %
    lr: Weight = 2e-3
    # weight of the KL, in nats per latent dimension, against one unit of pixel error
    kl: Weight = 3e-4
    # largest std of the noise added to the latents, in units of their std: generated latents are not exact
    noise: Weight = 0.0


def train_autoencoder(
    config: AutoencoderTraining, network: AutoencoderConfig, pixels: np.ndarray, job: Job,
    start: Autoencoder | None = None,
) -> Autoencoder:  # fmt: skip
    """Learn to compress pictures; at the end the latents are scaled to a std of 1.

    With `start` only its decoder is trained further; encoder, scale and sizes stay the same.
    Shapes: pixels (n 64 64 3) uint8
    """
    _, seed, device = job
    torch.manual_seed(seed)  # torch initialises weights from its global stream
    model = Autoencoder(start.config if start else network).to(device, memory_format=torch.channels_last)
    if start:
        model.load_state_dict(start.state_dict())
        model.encoder.requires_grad_(False), model.quant_conv.requires_grad_(False)
    for step, minimise in optimise("autoencoder", config, {"autoencoder": model}, job, decay=1e-4):
        pick = torch.randint(len(pixels), (config.batch,), generator=rng(seed, "autoencoder", "batch", step))
        images = to_tensor(pixels[pick.numpy()]).to(device)  # (b 3 64 64)
        mean, logvar = model.moments(images)  # (b 4 8 8)
        generator = rng(seed, "autoencoder", "noise", step)
        noise = torch.randn(mean.shape, generator=generator).to(device)  # (b 4 8 8)
        std = (logvar / 2).exp()
        if config.noise:
            largest = config.noise / model.config.scaling_factor
            added = largest * torch.rand(len(mean), 1, 1, 1, generator=generator).to(device)
            std = (std**2 + added**2).sqrt()
        error = model.decoder(model.post_quant_conv(mean + std * noise)) - images  # (b 3 64 64)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()  # Kingma & Welling (10), nats per dimension
        mse = (error**2).mean()
        minimise(error.abs().mean() + mse + config.kl * kl, mse=mse.item(), kl=kl.item())
    if not start:
        model.config = replace(model.config, scaling_factor=1 / latent_std(model, pixels[:1024], device))
    return model


@torch.no_grad()
def latent_std(model: Autoencoder, pixels: np.ndarray, device: torch.device) -> float:
    """Standard deviation of the unscaled latents of these pictures.  Shapes: pixels (n 64 64 3) uint8"""
    parts = np.array_split(pixels, 8)
    return torch.cat([model.moments(to_tensor(part).to(device))[0] for part in parts]).std().item()
