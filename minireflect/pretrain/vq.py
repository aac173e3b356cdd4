"""Train the vector-quantised autoencoder on pictures of the world:  64x64 pixels -> 8x8 forms with colours -> 4x8x8 latents.

L = w (z' - z)^2 + L_vq                          models/vq.py; van den Oord et al. 2017, without an adversarial part

Every scene is drawn twice, the second time in other colours.  Each of the two is then to be made from its own colours and the other's forms.
Where the two differ there are things, and these patches weigh more (w, 1 on average): a small ball in a large tank is few pixels, and whether it is wooden is the whole story.
z are the latents that the autoencoder, which stays as it is, makes of the picture.  With what it draws from z' compared with the pictures from the start on, the error of
the latents fell three times more slowly (and at half the batch, as that costs most of the time).  With `continued` the decoder alone goes on:

L = (z' - z)^2 + w (|x' - x| + (x' - x)^2)       coloured pixels weigh more: a plain mean is content with a blue block that has a purple corner

python train.py vq [--vq.continued]
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.autoencoder import Autoencoder
from ..models.vq import Codec, VQAutoencoder, VQConfig
from ..run import Run
from ..streams import rng
from ..world.canvas import to_tensor
from .optimise import encode_all, lr_factor, set_lr


@dataclass(frozen=True)
class VQTraining:
    pictures: int = 30_000  # drawn once, then shuffled; half of them are the twins of the others
    steps: int = 6_000
    batch: int = 128  # pictures, twins included
    lr: float = 2e-3  # peak; cosine to zero after a warm-up of 5 %
    forms: int = 512  # words of the first codebook
    colors: int = 256  # words of the second
    things: float = 5.0  # weight of a patch with a thing, where one without weighs 1
    revived: int = 50  # steps between two looks at which words nobody uses; they are moved, in the first half
    continued: bool = False  # go on with the decoder of the one in --weights, by what it draws; its words stay what they are
    drawn: int = 16  # pictures of a batch then
    colored: float = 5.0  # weight of a coloured pixel then, where one of the paper weighs 1

    def __post_init__(self) -> None:
        if self.batch < 2 or self.batch % 2 or self.pictures < 2:
            raise ValueError(
                f"batch is {self.batch}, pictures {self.pictures}: each has its twin beside it, so an even batch and 2 pictures or more are wanted"
            )


def train_vq(
    config: VQTraining,
    pixels: np.ndarray,
    twins: np.ndarray,
    seed: int,
    autoencoder: Autoencoder,
    run: Run,
    device: torch.device,
) -> VQAutoencoder:
    """Learn to say pictures in forms and colours.  Shapes: pixels, twins (n 64 64 3) uint8"""
    torch.manual_seed(seed)
    autoencoder = autoencoder.to(device).eval().requires_grad_(False)
    n, both = len(pixels), np.concatenate([pixels, twins])
    latents = encode_all(autoencoder.encode, both, device)  # (2n z 8 8)
    model = VQAutoencoder(VQConfig(latents.shape[1], forms=config.forms, colors=config.colors)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-4)
    books = {"forms": model.forms, "colors": model.colors}
    seen = torch.nn.Module()  # a module, so that a run saves it: choices since the last look
    for name, book in books.items():
        seen.register_buffer(name, torch.zeros(len(book.words.weight), device=device))  # (k)
    for step in run.steps("vq", config.steps, {"vq": model, "seen": seen}, optimizer, save_every=20):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        pick = torch.randint(n, (config.batch // 2,), generator=rng(seed, "vq", "batch", step))
        pick = torch.cat([pick, pick + n])  # (b)
        images = to_tensor(both[pick.numpy()]).to(device)  # (b 3 64 64)
        twin = images.roll(config.batch // 2, 0)  # (b 3 64 64)
        out, found, codes = model(images, twin)  # (b z 8 8)
        error = (out - latents[pick]) ** 2  # (b z 8 8)
        of_latents = error.mean()
        loss = (things(images, twin, config.things) * error).mean() + found.loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        values = {"loss": loss.item(), "latents": of_latents.item()}
        for (name, book), chosen, z in zip(books.items(), found, codes):
            used = getattr(seen, name)
            used += torch.bincount(chosen.ids.flatten(), minlength=len(used))
            if (step + 1) % config.revived == 0:
                values |= {
                    f"{name}_used": (used > 0).float().mean().item(),
                    f"{name}_perplexity": perplexity(used),
                }
                if 2 * step < config.steps:
                    book.revive(z.detach(), used, rng(seed, "vq", "revive", name, step))
                used.zero_()
        run.log("vq", step, **values)
        run.bar.set_postfix(latents=f"{values['latents']:.4f}")
    return model.eval().requires_grad_(False)


def refine_vq(
    config: VQTraining, pixels: np.ndarray, seed: int, codec: Codec, run: Run, device: torch.device
) -> VQAutoencoder:
    """Teach the decoder to draw better from the same words.  Shapes: pixels (n 64 64 3) uint8"""
    codec = codec.to(device)
    model = codec.vq.train()
    model.decoder.requires_grad_(True)
    latents = encode_all(codec.autoencoder.encode, pixels, device)  # (n z 8 8)
    ids = encode_all(model.encode, pixels, device)  # (n 8 8)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=config.lr, weight_decay=1e-4)
    for step in run.steps("vq", config.steps, {"vq": model}, optimizer, save_every=20):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        pick = torch.randint(len(pixels), (config.drawn,), generator=rng(seed, "vq", "batch", step))
        images = to_tensor(pixels[pick.numpy()]).to(device)  # (b 3 64 64)
        out = model.decode(ids[pick])  # (b z 8 8)
        error = codec.autoencoder.decode(out) - images  # (b 3 64 64)
        of_latents = F.mse_loss(out, latents[pick])
        loss = of_latents + (weights(images, config.colored) * (error.abs() + error**2)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimizer.step()
        mse = error.square().mean().item()
        run.log("vq", step, loss=loss.item(), latents=of_latents.item(), mse=mse)
        run.bar.set_postfix(mse=f"{mse:.4f}")
    return model.eval().requires_grad_(False)


def things(images: Tensor, twins: Tensor, weight: float) -> Tensor:
    """How much each patch counts, 1 on average: those where the two differ `weight` times as much.  Shapes: images, twins (b 3 8h 8w) -> (b 1 h w)"""
    differ = F.max_pool2d((images - twins).abs().amax(1, keepdim=True), 8) > 0.1  # of 2, black to white
    value = torch.where(differ, weight, 1.0)
    return value / value.mean()


def weights(images: Tensor, colored: float) -> Tensor:
    """How much each pixel counts, 1 on average: the coloured ones `colored` times as much.  Shapes: images (m 3 h w) -> (m 1 h w)"""
    vivid = images.amax(1, keepdim=True) - images.amin(1, keepdim=True) > 0.5  # of 2, black to white
    weight = torch.where(vivid, colored, 1.0)
    return weight / weight.mean()


def perplexity(used: Tensor) -> float:
    """How many words a codebook would have that is used as evenly as this one: exp of the entropy.  Shapes: used (k)"""
    share = used / used.sum().clamp(min=1)
    return torch.special.entr(share).sum().exp().item()
