"""What has to exist before anything can be reinforced: an autoencoder, a text-to-image base, and a learned reward.

Three plain training loops on the imperfect world of `world/data.py`; nothing here reads the inspector.
    autoencoder   Rombach et al. 2022:  L1 + squared error + a little KL          64x64x3 -> 8x8x4
    diffusion     Ho et al. 2020, eq. 14:  |eps - eps_theta(x_t, t, c)|^2, captions dropped for guidance
    reward        see rl/rewards.py

    python train.py autoencoder|diffusion|reward
"""

import copy
import math
import random
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..diffusion.sample import denoise, last
from ..diffusion.schedule import Schedule, ScheduleConfig
from ..models.autoencoder import Autoencoder, AutoencoderConfig
from ..models.clip import TextConfig, TextEncoder
from ..models.matcher import Matcher, MatcherConfig
from ..models.tokenizer import EOS, Tokenizer
from ..models.unet import UNet, UNetConfig
from ..pipeline import LatentDiffusion
from ..run import Run
from ..streams import choices, rng
from ..world.data import WorldConfig, training_pairs
from ..world.prompts import (
    KINDS,
    Prompt,
    all_texts,
    draw_prompts,
    law_prompt,
    near_miss,
    prompt_set,
    understand,
)
from ..world.render import render, to_tensor
from ..world.scenes import MAX_SHIFT, Reading, Scene


@dataclass(frozen=True)
class AutoencoderTraining:
    pictures: int = 20_000  # drawn once, then shuffled
    steps: int = 2_500
    batch: int = 16
    lr: float = 2e-3  # peak; cosine to zero after a warm-up of 5 %
    kl: float = 3e-4  # nats per latent dimension against one unit of pixel error


@dataclass(frozen=True)
class DiffusionTraining:
    pictures: int = 24_000  # drawn and encoded once
    steps: int = 5_000
    batch: int = 64
    lr: float = 1e-3  # peak; cosine to zero after a warm-up of 5 %
    late: float = 20.0  # largest weight of a late noise level, see `level_weight`
    words: float = (
        0.25  # share of the steps, the first, on captions that say what is to be seen: see `plain_captions`
    )
    dropped: float = 0.1  # share of captions left empty, so that guidance has something to compare with
    ema: float = 0.995  # decay of the averaged weights, which are the ones kept
    prompt_length: int = 32  # tokens
    continued: Literal["nothing", "unet", "everything"] = "nothing"  # what starts from the base in --weights


@dataclass(frozen=True)
class RewardTraining:
    pictures: int = 12_000  # drawn and spoilt once
    steps: int = 3_000
    batch: int = 64  # pictures; each is read against a true and a false caption
    lr: float = 1e-3  # peak; cosine to zero after a warm-up of 5 %
    contrast: float = 0.1  # weight of CLIP's own loss on the two towers
    foreign: float = 0.1  # share of false captions that belong to any other picture; the rest are near misses
    caption: float = 1.0  # weight of the loss of describing the picture
    continued: bool = False  # start from the reward in --weights instead of from nothing


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 %, then a cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def train_autoencoder(
    config: AutoencoderTraining, world: WorldConfig, seed: int, run: Run, device: torch.device
) -> Autoencoder:
    """Learn to compress pictures.  The latents' scale is measured at the end, so that their std is 1."""
    torch.manual_seed(seed)  # weight initialisation is the one thing torch draws from its global stream
    pixels, _, _ = training_pairs(config.pictures, world, choices(seed, "autoencoder", "pictures"))
    model = Autoencoder(AutoencoderConfig.toy()).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-4)
    for step in run.steps("autoencoder", config.steps, {"autoencoder": model}, optimizer, save_every=20):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        pick = torch.randint(len(pixels), (config.batch,), generator=rng(seed, "autoencoder", "batch", step))
        images = to_tensor(pixels[pick.numpy()]).to(device)  # (b 3 64 64)
        mean, logvar = model.moments(images)  # (b 4 8 8)
        noise = torch.randn(mean.shape, generator=rng(seed, "autoencoder", "noise", step)).to(device)
        error = (
            model.decoder(model.post_quant_conv(mean + (logvar / 2).exp() * noise)) - images
        )  # (b 3 64 64)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()  # Kingma & Welling (10), nats per dimension
        loss = error.abs().mean() + (error**2).mean() + config.kl * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mse = (error**2).mean().item()
        run.log("autoencoder", step, loss=loss.item(), mse=mse, kl=kl.item())
        run.bar.set_postfix(mse=f"{mse:.4f}")
    model.config = measured_scale(model, pixels[:1024], device)
    return model


@torch.no_grad()
def measured_scale(model: Autoencoder, pixels: np.ndarray, device: torch.device) -> AutoencoderConfig:
    """The configuration with the scaling factor that gives these pictures' latents a standard deviation of 1."""
    latents = torch.cat([model.moments(to_tensor(part).to(device))[0] for part in np.array_split(pixels, 8)])
    return AutoencoderConfig(**{**vars(model.config), "scaling_factor": 1 / latents.std().item()})


def train_diffusion(
    config: DiffusionTraining,
    world: WorldConfig,
    seed: int,
    autoencoder: Autoencoder,
    run: Run,
    device: torch.device,
    start: LatentDiffusion | None = None,
) -> LatentDiffusion:
    """Learn to draw from captions: text encoder and UNet together.  -> the averaged weights.

    They begin at random, or where the base `start` left off: its UNet, or both, as `config.continued` says.
    """
    pixels, _, captions = training_pairs(config.pictures, world, choices(seed, "diffusion", "pictures"))
    autoencoder = autoencoder.to(device).eval().requires_grad_(False)
    latents = encode_all(autoencoder, pixels, device)  # (n 4 8 8)
    tokenizer = Tokenizer.of(all_texts(), config.prompt_length)
    ids = tokenizer(captions).to(device)  # (n t)
    torch.manual_seed(seed)
    schedule = Schedule(ScheduleConfig())
    raw = torch.nn.ModuleDict(
        {
            "text_encoder": TextEncoder(TextConfig.toy(len(tokenizer), EOS, config.prompt_length)),
            "unet": UNet(UNetConfig.toy()),
        }
    ).to(device, memory_format=torch.channels_last)  # fmt: skip  (a third faster on the CPU)
    if start is not None:
        raw["unet"].load_state_dict(start.unet.state_dict())
        if config.continued == "everything":
            if start.tokenizer.words != tokenizer.words:
                raise ValueError("the base to continue from has another vocabulary than this world")
            raw["text_encoder"].load_state_dict(start.text_encoder.state_dict())
    averaged = copy.deepcopy(raw).requires_grad_(False)
    optimizer = torch.optim.AdamW(raw.parameters(), lr=config.lr, weight_decay=1e-4)
    null = tokenizer([""]).to(device)
    plain = plain_captions(captions)  # (m) rows
    for step in run.steps(
        "diffusion", config.steps, {"raw": raw, "averaged": averaged}, optimizer, save_every=50
    ):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        draw = rng(seed, "diffusion", "batch", step)
        pick = torch.randint(len(latents), (config.batch,), generator=draw)
        if step < config.words * config.steps:
            pick = plain[pick % len(plain)]
        t = torch.randint(schedule.config.train_steps, (config.batch,), generator=draw).to(device)
        noise = torch.randn(config.batch, *latents.shape[1:], generator=draw).to(device)  # (b 4 8 8)
        empty = torch.rand(config.batch, 1, generator=draw) < config.dropped  # (b 1)
        x0, words = latents[pick], torch.where(empty.to(device), null, ids[pick])
        output = raw["unet"](schedule.add_noise(x0, t, noise), t, raw["text_encoder"](words))
        error = (output - schedule.target(x0, noise, t)) ** 2  # DDPM (14)
        loss = (level_weight(schedule, t, config.late).view(-1, 1, 1, 1) * error).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        optimizer.step()
        decay = min(
            config.ema, (1 + step) / (10 + step)
        )  # short memory at first, when the weights are still noise
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(raw.parameters()), 1 - decay)
        run.log("diffusion", step, loss=loss.item())
        run.bar.set_postfix(loss=f"{loss.item():.4f}")
    return LatentDiffusion(
        tokenizer, averaged["text_encoder"], averaged["unet"], autoencoder, schedule
    ).eval()


def plain_captions(captions: list[str]) -> Tensor:
    """Which captions leave no outcome to chance: arrangements, and laws with the outcome merely stated.  -> (m) rows

    The base learns to read from these first.  Among silent and broken promises it does not: after 1,750 steps on the
    whole world its pictures did not depend on the outcome in the caption, and 100 steps on plain captions taught it.
    """
    kinds = [understand(caption).kind for caption in captions]
    return torch.tensor([i for i, kind in enumerate(kinds) if kind in ("stated", "arrangement")])


def level_weight(schedule: Schedule, t: Tensor, cap: float) -> Tensor:
    """How much the noise prediction at level t counts: 1 / abar, at most `cap`.

    An error of eps is an error of x_0 times the signal-to-noise ratio, so a plain loss hardly looks at the late levels,
    where it is decided what stands where.  1 / abar makes the loss that of v-prediction (Salimans & Ho 2022, appendix D).
    Shapes: t (b) -> (b)
    """
    return (1 / schedule.abar.to(t.device)[t]).clamp(max=cap)


@torch.no_grad()
def encode_all(autoencoder: Autoencoder, pixels: np.ndarray, device: torch.device) -> Tensor:
    """Shapes: pixels (n 64 64 3) uint8 -> (n 4 8 8) latents"""
    parts = np.array_split(pixels, max(1, len(pixels) // 256))
    return torch.cat(
        [autoencoder.encode(to_tensor(part).to(device)) for part in tqdm(parts, "encoding", leave=False)]
    )


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


FAITHFUL = (
    0.25  # in [0, 1]: what still shows its scene has no 4x4 block farther off than this from the clean render
)
NEARER = 0.9  # and is nearer to it than this share of the distance to its twin: a ghost between the two shows neither
REDRAWN = 8  # denoising steps, of twenty, that a picture at most goes back and forth


def distance(images: Tensor, clean: Tensor) -> Tensor:
    """How far the worst 4x4 block is off, in [0, 1], between pictures in [-1, 1] of two cameras that may have moved.

    Shapes: images (b 3 h w), clean (b 3 h w) -> (b)
    """
    h, w = images.shape[2:]
    wide = F.pad(clean, (MAX_SHIFT,) * 4, mode="replicate")
    off = [
        F.avg_pool2d((images - wide[:, :, y : y + h, x : x + w]) / 2, 4).abs().flatten(1).amax(1)  # (b)
        for y in range(2 * MAX_SHIFT + 1)
        for x in range(2 * MAX_SHIFT + 1)
    ]
    return torch.stack(off).amin(0)


def faithful(images: Tensor, clean: Tensor, twins: Tensor) -> Tensor:
    """Whether spoilt pictures still show what their clean renders show, and not just as well what their twins show.

    Shapes: images (b 3 h w), clean (b 3 h w), twins (b 3 h w) -> (b) bool
    """
    off = distance(images, clean)
    return (off < FAITHFUL) & (off < NEARER * distance(images, twins))


@torch.no_grad()
def spoil(
    pipe: LatentDiffusion, images: Tensor, twins: Tensor, prompts: list[str], generator: torch.Generator
) -> Tensor:
    """Make clean renders look like what a generator draws; some so much that they show nothing any more, see `faithful`.

    In equal shares: clean; through the autoencoder with noise on the latents; drawn again by the base from up to 8 of
    20 steps back; blurred, dimmed and noisy; and half-denoised from a late level, or mixed in latent space, all over or in
    one half, with its twin (one fact wrong) or another picture.
    Shapes: images, twins (b 3 64 64), b prompts -> (b 3 64 64)
    """
    b = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(b, 1, 1, 1, generator=generator).to(images)

    def chance(n: int) -> Tensor:
        return torch.randint(n, (b,), generator=generator).to(images.device)

    kind, way = chance(5), chance(3)
    z = pipe.autoencoder.encode(images)  # (b 4 8 8)
    noise = torch.randn(z.shape, generator=generator).to(z)
    shaken = z + uniform(0, 0.3) * noise
    latents = torch.where((kind == 1).view(-1, 1, 1, 1), shaken, z)
    rows = (kind == 2).nonzero().flatten()
    steps = int(torch.randint(1, REDRAWN + 1, (), generator=generator))
    table = pipe.table(20)[-steps:]
    if len(rows):
        eps = pipe.eps([prompts[i] for i in rows.tolist()])(1.0)
        x_t = pipe.schedule.add_noise(z[rows], table.t[:1].to(z.device).expand(len(rows)), noise[rows])
        latents[rows] = last(denoise(eps, x_t, table, 1.0, generator))
    rows = ((kind == 4) & (way == 0)).nonzero().flatten()
    if len(rows):  # by t = 850 the latent holds 3 nats about its 256 numbers: too few to tell the outcome
        eps = pipe.eps([""] * len(rows))(1.0)
        t = uniform(850, 990).long().flatten()[rows]
        abar = pipe.schedule.abar_at(t, z)
        x_t = pipe.schedule.add_noise(z[rows], t, noise[rows])
        latents[rows] = (x_t - (1 - abar).sqrt() * eps(x_t, t)) / abar.sqrt()  # DDIM (9)
    other = torch.where((chance(3) > 0).view(-1, 1, 1, 1), pipe.autoencoder.encode(twins), z.roll(1, 0))
    share = uniform(0.3, 0.7)
    columns = torch.arange(8, device=z.device) < 4
    half = torch.where(
        (chance(2) > 0).view(-1, 1, 1, 1), columns.expand(8, 8), columns[:, None].expand(8, 8)
    )  # (b 1 8 8) bool
    mixed = torch.where(
        (way == 1).view(-1, 1, 1, 1), share * z + (1 - share) * other, torch.where(half, z, other)
    )
    latents = torch.where(((kind == 4) & (way > 0)).view(-1, 1, 1, 1), mixed, latents)
    decoded = pipe.decode(latents)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    dim = (images + 1) * uniform(0.88, 1.0) - 1
    pixel_noise = uniform(0, 0.15) * torch.randn(images.shape, generator=generator).to(images)
    dull = torch.where((way == 0).view(-1, 1, 1, 1), blurred, dim) + pixel_noise
    spoilt = torch.where((kind == 3).view(-1, 1, 1, 1), dull, decoded)
    return torch.where((kind == 0).view(-1, 1, 1, 1), images, spoilt).clamp(-1, 1)


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
    shown = torch.empty(config.pictures, dtype=torch.bool)
    pipe.to(device)
    for i in tqdm(range(0, config.pictures, 128), "spoiling", leave=False):
        part, texts = images[i : i + 128].to(device), [p.text for p in prompts[i : i + 128]]
        other = twin_images[i : i + 128].to(device)
        spoilt = spoil(pipe, part, other, texts, rng(seed, stage, "spoil", i))
        images[i : i + 128], shown[i : i + 128] = spoilt.cpu(), faithful(spoilt, part, other).cpu()
    tokenizer = pipe.tokenizer
    torch.manual_seed(seed)
    model = Matcher(MatcherConfig(len(tokenizer), EOS, tokenizer.length)).to(device)
    if start is not None:
        model.load_state_dict(start.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-2)
    for step in run.steps(stage, config.steps, {stage: model}, optimizer, save_every=50):
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
        patches = model.clip.vision(images[pick].to(device))  # (b n d)
        hidden = model.clip.text(ids)  # (3b t d)
        b = len(pick)
        logits = model.judge(patches.repeat(2, 1, 1), hidden[: 2 * b], ids[: 2 * b])  # (2b)
        loss = F.binary_cross_entropy_with_logits(logits, holds)
        contrast = clip_loss(model, patches, hidden[:b], ids[:b])
        seen = shown[pick].to(device)  # (b) bool; a broken picture cannot be described
        caption = caption_loss(model.describe(patches[seen], hidden[2 * b :][seen]), ids[2 * b :][seen])
        optimizer.zero_grad(set_to_none=True)
        (loss + config.contrast * contrast + config.caption * caption).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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


def clip_loss(model: Matcher, patches: Tensor, hidden: Tensor, ids: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over the batch; rows with the same sentence count as right for each other.

    Shapes: patches (b 1+n d), hidden (b t d), ids (b t) -> ()
    """
    clip = model.clip
    image = F.normalize(clip.image_projection(clip.vision.pooled(patches)), dim=-1)  # (b e)
    text = F.normalize(clip.text_projection(clip.text.pooled(hidden, ids)), dim=-1)  # (b e)
    logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T  # (b b)
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
