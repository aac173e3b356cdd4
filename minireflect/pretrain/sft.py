"""ReasonGen-R1's first stage: supervised fine-tuning on prompts, rationales and pictures (arXiv 2505.24875, section 3.1).

    L = sum_i s_i CE_i / sum_i s_i,     s = 2 for the rationale's words and BOI, 1 for image tokens, 0 for what is given or filled up

Prompt and rationale are left empty in a tenth of the samples, so that guidance has something to compare with.  What the paper's base knows before,
drawing from dense captions and writing, ours learns in the same loop: `dense` makes rationales prompts, `told` adds the mean CE of rationales without pictures,
and `altered` and `related` show and say what no prompt asks for, so that what things look like, where they are and what becomes of them is learnt apart.

Differs from the released code: BOI, the switch from thinking to drawing, is learnt (there its weight is 0, and generation is told when to
switch); nothing is clamped, as text and image positions have logits of their own (there one row of logits is padded with -1e9 and clamped at 30).

    python train.py reason-sft
"""

import random
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..models.reasongen import ReasonGen, ReasonGenConfig
from ..models.tokenizer import EOS, Tokenizer, trim, up_to
from ..models.vq import Codec
from ..run import Run
from ..streams import choices, rng
from ..world.data import WorldConfig, training_pairs
from ..world.prompts import all_texts
from ..world.rationales import rationale, vocabulary
from .optimise import encode_all, lr_factor, set_lr

Thoughts = Literal["true", "none", "shuffled"]


@dataclass(frozen=True)
class ReasonTraining:
    pictures: int = 60_000  # drawn and turned into tokens once
    steps: int = 4_500
    batch: int = 64
    lr: float = 2e-3  # peak; cosine to zero after a warm-up of 5 %
    text: float = 2.0  # weight of a word of the rationale, the paper's
    image: float = 1.0  # weight of an image token
    dropped: float = 0.1  # share of samples without prompt and rationale
    arrangements: float = 0.35  # share of arrangements among the pictures, in place of the world's
    continued: bool = False  # go on with the model in --weights, perhaps one that learnt to draw
    dense: float = 0.0  # share of pictures with the rationale as prompt, a dense caption, and nothing thought
    altered: float = 0.0  # share of the laws' pictures that no prompt asks for, see world/data.py
    related: float = 0.0  # share of the captions of two things that name both colours and how they stand
    bf16: bool = False  # multiply in bfloat16, 1.7 times faster where the processor can (CPUs with AMX)
    told: int = 0  # rationales a step that are learnt without their picture, from the prompt: thinking for a third of the price
    rationales: Thoughts = "true"  # of the picture; none at all; or another picture's of the same law

    def __post_init__(self) -> None:
        for name in ("dropped", "dense", "arrangements", "altered", "related"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, a share from 0 to 1 is wanted")
        if self.told < 0:
            raise ValueError(f"told is {self.told}, a number of rationales is wanted, 0 for none")


class Lessons(NamedTuple):
    """What is learnt from, as tokens."""

    prompts: Tensor  # (m p)
    words: Tensor  # (m r) rationale, BOI, EOS
    codes: Tensor  # (m n)
    captions: Tensor  # (m p) never a dense one
    thoughts: Tensor  # (m r) of the picture, also where none is wanted


def reason_tokenizer(length: int) -> Tokenizer:
    """Knows the words of all prompts and rationales."""
    return Tokenizer.of([*all_texts(), *vocabulary()], length)


def lessons(
    training: ReasonTraining, world: WorldConfig, seed: int, tokenizer: Tokenizer, config: ReasonGenConfig, codec: Codec, device: torch.device
) -> Lessons:  # fmt: skip
    """Draw the world and turn it into tokens."""
    draw = choices(seed, "reason-sft", "pictures")
    world = replace(world, arrangements=training.arrangements)
    pixels, scenes, captions = training_pairs(
        training.pictures, world, draw, training.altered, training.related
    )
    thoughts = [rationale(s, rng=draw) for s in scenes]
    if training.rationales == "shuffled":
        thoughts = shuffled(thoughts, [s.law for s in scenes], draw)
    is_dense = [draw.random() < training.dense for _ in scenes]
    prompts = [thought if dense else caption for thought, caption, dense in zip(thoughts, captions, is_dense)]
    words = ["" if dense or training.rationales == "none" else t for t, dense in zip(thoughts, is_dense)]
    codes = encode_all(codec.to(device).codes, pixels, device)  # (m n)

    def ids(prompts: list[str], words: list[str]) -> tuple[Tensor, Tensor]:
        return tokenizer(prompts).to(device), tokenizer.encode(words, config.rationale, config.boi).to(device)

    return Lessons(*ids(prompts, words), codes, *ids(captions, thoughts))


def shuffled(thoughts: list[str], laws: list[str], draw: random.Random) -> list[str]:
    """Each picture with the rationale of another of the same law: the same words, the wrong scene."""
    given = list(thoughts)
    for law in dict.fromkeys(laws):
        rows = [i for i, name in enumerate(laws) if name == law]
        for i, j in zip(rows, draw.sample(rows, len(rows))):
            given[i] = thoughts[j]
    return given


def lesson_loss(
    model: ReasonGen, data: Lessons, training: ReasonTraining, device: torch.device, chance: Generator
) -> tuple[Tensor, dict[str, float]]:
    """L of a batch of lessons.  -> () nats a token, its parts in nats a word and an image token"""
    pick = torch.randint(len(data.codes), (training.batch,), generator=chance)
    empty = torch.rand(training.batch, 1, generator=chance).to(device) < training.dropped  # (b 1)
    blank = model.blank(training.batch, device)
    prompts, words = (torch.where(empty, b, v[pick]) for b, v in zip(blank, data))
    prompts, words = trim(prompts, EOS), trim(words, model.config.boi)
    with torch.autocast(device.type, torch.bfloat16, enabled=training.bf16):
        text, *image = model(prompts, words, data.codes[pick])  # (b r v+1), (b n f), (b n k)
    mask = up_to(words, model.config.boi) & ~empty  # (b r)
    of_text = F.cross_entropy(text[mask].float(), words[mask], reduction="sum") / mask.sum().clamp(min=1)
    of_image = sum(
        F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
        for logits, ids in zip(image, model.split(data.codes[pick]))
    )  # nats of a form, and of colours given the form
    share = training.text * mask.sum(), training.image * data.codes[pick].numel()
    loss = (share[0] * of_text + share[1] * of_image) / sum(share)
    return loss, {"text": of_text.item(), "image": of_image.item()}


def told_loss(
    model: ReasonGen, data: Lessons, training: ReasonTraining, device: torch.device, chance: Generator
) -> Tensor:
    """Mean cross-entropy of the words of `training.told` rationales, which end in BOI before anything is drawn.  -> () nats a word"""
    pick = torch.randint(len(data.codes), (training.told,), generator=chance)
    prompts, words = trim(data.captions[pick], EOS), trim(data.thoughts[pick], model.config.boi)
    with torch.autocast(device.type, torch.bfloat16, enabled=training.bf16):
        text = model(prompts, words, data.codes[pick, :1]).text  # (b r v+1)
    mask = up_to(words, model.config.boi)  # (b r)
    return F.cross_entropy(text[mask].float(), words[mask])


def train_reasongen(
    training: ReasonTraining, world: WorldConfig, seed: int, codec: Codec, run: Run, device: torch.device,
    start: tuple[ReasonGen, Tokenizer] | None = None,
) -> tuple[ReasonGen, Tokenizer]:  # fmt: skip
    """Learn to think and to draw, from nothing or from `start`."""
    torch.manual_seed(seed)
    if start is None:
        tokenizer = reason_tokenizer(ReasonGenConfig.prompt)
        sizes = codec.vq.config
        config = ReasonGenConfig(len(tokenizer), sizes.forms, sizes.colors, sizes.dimensions)
        model = ReasonGen(config, (codec.vq.forms.codebook, codec.vq.colors.codebook)).to(device)
    else:
        model, tokenizer = start[0].to(device).train().requires_grad_(True), start[1]
        config = model.config
    data = lessons(training, world, seed, tokenizer, config, codec, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, betas=(0.9, 0.95), weight_decay=5e-2)
    for step in run.steps("reason-sft", training.steps, {"model": model}, optimizer, save_every=50):
        set_lr(optimizer, training.lr * lr_factor(step, training.steps))
        chance = rng(seed, "reason-sft", "batch", step)
        loss, losses = lesson_loss(model, data, training, device, chance)
        if training.told:
            of_told = told_loss(model, data, training, device, rng(seed, "reason-sft", "told", step))
            loss, losses["told"] = loss + of_told, of_told.item()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log("reason-sft", step, loss=loss.item(), **losses)
        run.bar.set_postfix({name: f"{nats:.3f} nats" for name, nats in losses.items()})
    return model.eval().requires_grad_(False), tokenizer
