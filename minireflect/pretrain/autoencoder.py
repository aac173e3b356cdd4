"""Train the autoencoder on pictures of a world:  64x64x3 -> 8x8x4.

L = |x' - x| + (x' - x)^2 + kl KL(q(z|x) || N(0, I))        Rombach et al. 2022, without the adversarial part

Or teach a smaller one the latents of another, so that whatever draws with those can go on doing so (Hinton et al. 2015, "Distilling the knowledge"):

L = |mu - mu_t|^2 + |log var - log var_t|^2 / 100 + |D(z) - D_t(z)| + (D(z) - D_t(z))^2,        z = mu_t + noise

python train.py autoencoder [--autoencoder.taught]
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from ..models.autoencoder import Autoencoder, AutoencoderConfig
from ..run import Run
from ..streams import rng
from ..world.canvas import to_tensor
from .optimise import lr_factor, set_lr


@dataclass(frozen=True)
class AutoencoderTraining:
    pictures: int = 20_000  # drawn once, then shuffled
    steps: int = 2_500
    batch: int = 16
    lr: float = 2e-3  # peak; cosine to zero after a warm-up of 5 %
    kl: float = 3e-4  # nats per latent dimension against one unit of pixel error
    noise: float = 0.0  # most noise added to the latents, in their standard deviations: those of a generator are not exact
    taught: bool = False  # a smaller one learns from the one in --weights
    continued: bool = False  # go on with the decoder of the one in --weights; its latents stay what they are

    def __post_init__(self) -> None:
        if self.taught and self.continued:
            raise ValueError("taught begins a smaller autoencoder, continued goes on with this one: choose")


def train_autoencoder(
    config: AutoencoderTraining,
    network: AutoencoderConfig,
    pixels: np.ndarray,
    seed: int,
    run: Run,
    device: torch.device,
    start: Autoencoder | None = None,
) -> Autoencoder:
    """Learn to compress pictures.  The latents' scale is measured at the end, so that their std is 1.

    From a `start` only the decoder learns, and scale and latents are kept.
    Shapes: pixels (n 64 64 3) uint8
    """
    torch.manual_seed(seed)  # weight initialisation is the one thing torch draws from its global stream
    model = Autoencoder(network if start is None else start.config)
    model = model.to(device, memory_format=torch.channels_last)
    if start is not None:
        model.load_state_dict(start.state_dict())
        model.encoder.requires_grad_(False), model.quant_conv.requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=config.lr, weight_decay=1e-4)
    for step in run.steps("autoencoder", config.steps, {"autoencoder": model}, optimizer, save_every=20):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        pick = torch.randint(len(pixels), (config.batch,), generator=rng(seed, "autoencoder", "batch", step))
        images = to_tensor(pixels[pick.numpy()]).to(device)  # (b 3 64 64)
        mean, logvar = model.moments(images)  # (b 4 8 8)
        chance = rng(seed, "autoencoder", "noise", step)
        noise = torch.randn(mean.shape, generator=chance).to(device)  # (b 4 8 8)
        spread = (logvar / 2).exp()
        if config.noise:
            most = config.noise / model.config.scaling_factor
            spread = (
                spread**2 + (most * torch.rand(len(mean), 1, 1, 1, generator=chance).to(device)) ** 2
            ).sqrt()
        error = model.decoder(model.post_quant_conv(mean + spread * noise)) - images  # (b 3 64 64)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()  # Kingma & Welling (10), nats per dimension
        loss = error.abs().mean() + (error**2).mean() + config.kl * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        mse = (error**2).mean().item()
        run.log("autoencoder", step, loss=loss.item(), mse=mse, kl=kl.item())
        run.bar.set_postfix(mse=f"{mse:.4f}")
    if start is None:
        model.config = measured_scale(model, pixels[:1024], device)
    return model


def teach_autoencoder(
    config: AutoencoderTraining,
    teacher: Autoencoder,
    pixels: np.ndarray,
    seed: int,
    run: Run,
    device: torch.device,
) -> Autoencoder:
    """A smaller autoencoder that encodes and draws as `teacher` does.  It begins with the teacher's layers wherever they have the same shape.

    Latents get up to `config.noise` standard deviations of noise, as those of a generator are not exact either.
    Shapes: pixels (n 64 64 3) uint8
    """
    torch.manual_seed(seed)
    scale = teacher.config.scaling_factor
    model = Autoencoder(replace(AutoencoderConfig.small(), scaling_factor=scale))
    own, theirs = model.state_dict(), teacher.state_dict()
    model.load_state_dict(
        {k: theirs[k] if k in theirs and theirs[k].shape == v.shape else v for k, v in own.items()}
    )
    model = model.to(device, memory_format=torch.channels_last)
    teacher = teacher.to(device).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-4)
    for step in run.steps("autoencoder", config.steps, {"autoencoder": model}, optimizer, save_every=20):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        pick = torch.randint(len(pixels), (config.batch,), generator=rng(seed, "autoencoder", "batch", step))
        images = to_tensor(pixels[pick.numpy()]).to(device)  # (b 3 64 64)
        chance = rng(seed, "autoencoder", "noise", step)
        with torch.no_grad():
            mean_t, logvar_t = teacher.moments(images)  # (b 4 8 8)
            level = config.noise * torch.rand(len(images), 1, 1, 1, generator=chance)
            z = mean_t * scale + (level * torch.randn(mean_t.shape, generator=chance)).to(device)
            wanted = teacher.decode(z)  # (b 3 64 64)
        mean, logvar = model.moments(images)
        error = model.decode(z) - wanted  # (b 3 64 64)
        latents = F.mse_loss(mean * scale, mean_t * scale)
        loss = latents + F.mse_loss(logvar, logvar_t) / 100 + error.abs().mean() + (error**2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mse = (error**2).mean().item()
        run.log("autoencoder", step, loss=loss.item(), mse=mse, latents=latents.item())
        run.bar.set_postfix(mse=f"{mse:.5f}", latents=f"{latents.item():.5f}")
    return model


@torch.no_grad()
def measured_scale(model: Autoencoder, pixels: np.ndarray, device: torch.device) -> AutoencoderConfig:
    """The configuration with the scaling factor that gives these pictures' latents a standard deviation of 1."""
    latents = torch.cat([model.moments(to_tensor(part).to(device))[0] for part in np.array_split(pixels, 8)])
    return AutoencoderConfig(**{**vars(model.config), "scaling_factor": 1 / latents.std().item()})
