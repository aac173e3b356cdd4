"""Train the learned reward: which captions hold for which pictures, from the scenes' own facts; nothing here reads the inspector.

L = BCE(match) + contrast CLIP(towers) + caption CE(next word)         the network: models/matcher.py, as a reward: rl/rewards.py

python train.py reward
"""

import math
import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..models.matcher import Matcher, MatcherConfig
from ..models.tokenizer import EOS
from ..pipeline import LatentDiffusion
from ..run import Run
from ..streams import choices, rng
from ..world.prompts import (
    KINDS,
    Prompt,
    draw_prompts,
    law_prompt,
    near_miss,
    prompt_set,
)
from ..world.render import render
from ..world.scenes import Reading, Scene
from .rate import lr_factor, set_lr
from .spoil import faithful, spoil


@dataclass(frozen=True)
class RewardTraining:
    pictures: int = 16_000  # drawn and spoilt once
    steps: int = 5_000
    batch: int = 64  # pictures; each is read against a true and a false caption
    lr: float = 1e-3  # peak; cosine to zero after a warm-up of 5 %
    contrast: float = 0.1  # weight of CLIP's own loss on the two towers
    foreign: float = 0.1  # share of false captions that belong to any other picture; the rest are near misses
    caption: float = 1.0  # weight of the loss of describing the picture
    spoilt: bool = True  # learn from pictures spoilt as a generator spoils them; without, RL finds what the reward never saw
    continued: bool = False  # start from the reward in --weights instead of from nothing


def fair_prompt(draw: random.Random) -> Prompt:
    """A prompt of any kind in equal shares, lawful outcomes put into words among them; training combinations only.

    Three quarters of the arrangements say where things are, which is the hardest of their kinds to judge.
    """
    kind = draw.choice((*KINDS, "stated"))
    if kind == "arrangement" and draw.random() < 0.75:
        return draw.choice([p for p in prompt_set(kind, "train") if p.task.kind == "position"])
    if kind != "stated":
        return draw.choice(draw_prompts(kind, "train", 8, draw))  # 8: one of each law
    prompt = draw.choice(draw_prompts("physical", "train", 8, draw))
    return law_prompt(prompt.law, prompt.objects, prompt.outcome)


def train_reward(
    config: RewardTraining,
    seed: int,
    pipe: LatentDiffusion,
    run: Run,
    device: torch.device,
    start: Matcher | None = None,
) -> Matcher:
    """Learn which captions hold for which pictures, from the scenes' own facts; the inspector has no part in it.

    The network begins at random, or where `start` left off.
    """
    stage = "reward"
    draw = choices(seed, stage, "pictures")
    prompts = [fair_prompt(draw) for _ in range(config.pictures)]
    scenes = [p.scene(draw) for p in prompts]
    twins = [
        replace(near_miss(p, draw).scene(draw), shift=s.shift) for p, s in zip(prompts, scenes)
    ]  # seen by the same camera
    images, twin_images = (
        torch.stack([render(s) for s in tqdm(part, "drawing", leave=False)]) for part in (scenes, twins)
    )  # (n 3 64 64)
    shown = torch.ones(config.pictures, dtype=torch.bool)
    pipe.to(device)
    for i in tqdm(range(0, config.pictures * config.spoilt, 128), "spoiling", leave=False):
        part, texts = images[i : i + 128].to(device), [p.text for p in prompts[i : i + 128]]
        other = twin_images[i : i + 128].to(device)
        spoilt = spoil(pipe, part, other, texts, rng(seed, stage, "spoil", i))
        images[i : i + 128], shown[i : i + 128] = spoilt.cpu(), faithful(spoilt, part, other).cpu()
    tokenizer = pipe.tokenizer
    torch.manual_seed(seed)
    model = Matcher(MatcherConfig(len(tokenizer), EOS, tokenizer.length)).to(device)
    if start is not None:
        model.load_state_dict(start.state_dict())
    joint = JointSpace(model.config.width).to(device)
    parameters = [*model.parameters(), *joint.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=1e-2)
    for step in run.steps(stage, config.steps, {stage: model, "joint": joint}, optimizer, save_every=50):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        pick = torch.randperm(config.pictures, generator=rng(seed, stage, "batch", step))[
            : config.batch
        ].tolist()
        told = choices(seed, stage, "captions", step)
        true = [prompts[i] for i in pick]
        false = [false_prompt(prompts[i], scenes[i], prompts, config.foreign, told) for i in pick]
        texts = [p.text for p in true] + [p.text for p in false] + [full_text(p) for p in true]
        ids = tokenizer(texts).to(device)  # (3b t)
        longest = int((ids == EOS).int().argmax(1).max()) + 1  # beyond it there is only padding
        ids = ids[:, :longest]
        holds = torch.cat([shown[pick].float(), torch.zeros(len(pick))]).to(device)  # (2b)
        patches = model.vision(images[pick].to(device))  # (b n d)
        hidden = model.text(ids)  # (3b t d)
        b = len(pick)
        logits = model.judge(patches.repeat(2, 1, 1), hidden[: 2 * b], ids[: 2 * b])  # (2b)
        loss = F.binary_cross_entropy_with_logits(logits, holds)
        contrast = joint.loss(patches[:, 0], model.text.pooled(hidden[:b], ids[:b]), ids[:b])
        seen = shown[pick].to(device)  # (b) bool; a broken picture cannot be described
        caption = caption_loss(model.describe(patches[seen], hidden[2 * b :][seen]), ids[2 * b :][seen])
        optimizer.zero_grad(set_to_none=True)
        (loss + config.contrast * contrast + config.caption * caption).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        right = ((logits > 0) == (holds > 0.5)).float().mean().item()
        run.log(stage, step, loss=loss.item(), contrast=contrast.item(), caption=caption.item(), right=right)
        run.bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.2f}")
    return model.eval().requires_grad_(False)


def false_prompt(
    true: Prompt, scene: Scene, others: list[Prompt], foreign: float, draw: random.Random
) -> Prompt:
    """A sentence that the scene does not fulfil: a near miss of the true one, or with probability `foreign` any other.

    A near miss of an arrangement can hold by chance (what is left of a ball may stand above it too), so it is checked.
    """
    while True:
        prompt = draw.choice(others) if draw.random() < foreign else near_miss(true, draw)
        if not prompt.fulfilled_by(Reading(scene, 0.0)):
            return prompt


def full_text(prompt: Prompt) -> str:
    """The sentence that tells everything about the prompt's picture, a lawful outcome included."""
    return prompt.text if prompt.task else law_prompt(prompt.law, prompt.objects, prompt.outcome).text


def caption_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of every next word up to the end of the sentence: CoCa (Yu et al. 2022), equation 3, a mean over words.

    Shapes: logits (b t v), ids (b t) -> ()
    """
    after = ids[:, 1:]  # (b t-1)
    padding = (after == EOS).cumsum(1) - (after == EOS).int() > 0  # (b t-1) whatever follows the first end
    total = F.cross_entropy(logits[:, :-1][~padding], after[~padding], reduction="sum")
    return total / max(1, int((~padding).sum()))  # a small batch may hold broken pictures only


class JointSpace(nn.Module):
    """What CLIP adds to its towers, for its own loss; nobody needs it afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.text = nn.Linear(width, width, bias=False)
        self.image = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # section 2.5: temperature 0.07

    def loss(self, image: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        """CLIP's symmetric cross-entropy over the batch; rows with the same sentence count as right for each other.

        Shapes: image (b d) class tokens, text (b d) pooled, ids (b t) -> ()
        """
        image, text = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        logits = self.logit_scale.exp().clamp(max=100) * image @ text.T  # (b b)
        same = (ids[:, None] == ids[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
