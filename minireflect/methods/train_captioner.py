"""Train the captioner, which tells whether a picture keeps what a rationale promises.

L = CE of the next word of the picture's rationale, given the picture and the words before       CoCa (Yu et al. 2022), equation 3

The network is SRRL's matcher (models/matcher.py) without its verdict.  A yes or no teaches one bit a picture; whoever can say the next word
of any true plan has to see every fact of it, and finds the word that is not true.  As a reward: rl/rewards.py, `caption_reward`.
Its pictures are of training combinations, and six in ten of the laws' of things that no prompt asks for, lest it says what usually is in place of what it sees.

    python train.py captioner
"""

from dataclasses import dataclass, replace

import torch

from ..models.matcher import Matcher, MatcherConfig
from ..models.reasongen import trim
from ..models.tokenizer import EOS, Tokenizer
from ..run import Run
from ..streams import choices, rng
from ..world.data import WorldConfig, training_pairs
from ..world.rationales import rationale
from ..world.render import to_tensor
from .rate import lr_factor, set_lr
from .train_reward import caption_loss


@dataclass(frozen=True)
class CaptionerTraining:
    pictures: int = 20_000
    steps: int = 2_500
    batch: int = 64
    lr: float = 1e-3  # peak; cosine to zero after a warm-up of 5 %
    width: int = 64  # of the network
    arrangements: float = 0.3  # share of arrangements among the pictures
    altered: float = 0.6  # share of the laws' pictures with things that no prompt asks for

    def __post_init__(self) -> None:
        for name in ("arrangements", "altered"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, a share from 0 to 1 is wanted")


def train_captioner(
    config: CaptionerTraining, world: WorldConfig, seed: int, tokenizer: Tokenizer, run: Run, device: torch.device
) -> Matcher:  # fmt: skip
    """Learn to say what is to be seen, in the words and the styles of rationales."""
    draw = choices(seed, "captioner", "pictures")
    world = replace(world, arrangements=config.arrangements)
    pixels, scenes, _ = training_pairs(config.pictures, world, draw, config.altered)
    torch.manual_seed(seed)
    sizes = MatcherConfig(len(tokenizer), EOS, tokenizer.length, width=config.width, fused=True, init_std=1.0)
    model = Matcher(sizes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-2)
    for step in run.steps("captioner", config.steps, {"captioner": model}, optimizer, save_every=50):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        pick = torch.randint(len(pixels), (config.batch,), generator=rng(seed, "captioner", "batch", step))
        told = choices(seed, "captioner", "styles", step)
        texts = [rationale(scenes[i], draw=told) for i in pick.tolist()]
        ids = trim(tokenizer(texts), EOS).to(device)  # (b t)
        patches = model.vision(to_tensor(pixels[pick.numpy()]).to(device))  # (b n d)
        loss = caption_loss(model.describe(patches, model.text(ids)), ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log("captioner", step, loss=loss.item())
        run.bar.set_postfix(loss=f"{loss.item():.3f} nats a word")
    return model.eval().requires_grad_(False)
