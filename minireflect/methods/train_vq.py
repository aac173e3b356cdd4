"""Train the vector-quantised autoencoder on pictures of the world:  64x64x3 -> 8x8 words of a codebook.

L = |x' - x| + (x' - x)^2 + L_vq                models/vq.py; van den Oord et al. 2017, without an adversarial part

python train.py vq
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models.vq import VQAutoencoder, VQConfig
from ..run import Run
from ..streams import rng
from ..world.render import to_tensor
from .rate import lr_factor, set_lr


@dataclass(frozen=True)
class VQTraining:
    pictures: int = 20_000  # drawn once, then shuffled
    steps: int = 4_000
    batch: int = 16
    lr: float = 2e-3  # peak; cosine to zero after a warm-up of 5 %
    codes: int = 1024  # words of the codebook
    revived: int = (
        50  # steps between two looks at which words nobody uses; those are moved, up to half of the training
    )


def train_vq(
    config: VQTraining, pixels: np.ndarray, seed: int, run: Run, device: torch.device
) -> VQAutoencoder:
    """Learn to compress pictures to tokens.  Shapes: pixels (n 64 64 3) uint8"""
    torch.manual_seed(seed)
    model = VQAutoencoder(VQConfig(codes=config.codes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-4)
    seen = torch.nn.Module()  # a module, so that a run saves it
    seen.register_buffer("used", torch.zeros(config.codes, device=device))  # (k) choices since the last look
    for step in run.steps("vq", config.steps, {"vq": model, "seen": seen}, optimizer, save_every=20):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        pick = torch.randint(len(pixels), (config.batch,), generator=rng(seed, "vq", "batch", step))
        images = to_tensor(pixels[pick.numpy()]).to(device)  # (b 3 64 64)
        z = model.codes(images)  # (b d 8 8)
        vectors, ids, loss_vq = model.quantiser(z)
        error = model.draw(vectors) - images  # (b 3 64 64)
        loss = error.abs().mean() + (error**2).mean() + loss_vq
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.used += torch.bincount(ids.flatten(), minlength=config.codes)
        values = {"loss": loss.item(), "mse": (error**2).mean().item(), "vq": loss_vq.item()}
        if (step + 1) % config.revived == 0:
            values |= {"used": (seen.used > 0).float().mean().item(), "perplexity": perplexity(seen.used)}
            if 2 * step < config.steps:
                model.quantiser.revive(z.detach(), seen.used, rng(seed, "vq", "revive", step))
            seen.used.zero_()
        run.log("vq", step, **values)
        run.bar.set_postfix(mse=f"{values['mse']:.4f}")
    return model


def perplexity(used: Tensor) -> float:
    """How many words a codebook would have that is used as evenly as this one: exp of the entropy.  Shapes: used (k)"""
    share = used / used.sum().clamp(min=1)
    return torch.special.entr(share).sum().exp().item()
