"""ReasonGen-R1's second stage: GRPO on rationale and picture together, with a judge's verdict (arXiv 2505.24875, section 3.2).

    for each iteration:
        until enough groups are mixed:  draw prompts;  G x (rationale, picture) each
        R = 1 if the judge accepts the picture for its prompt, and the captioner for its rationale, else 0
        A = (R - mean) / (std + e) in each group, the same for every token that the policy chose, word or image token
        L = mean over tokens of max(-A rho, -A clip(rho, 1 - e, 1 + e)) + beta KL(pi || pi_ref) + alpha_text H_text + alpha_image H_image
            + recall L_SFT, stage 1's loss on true pictures

Groups whose rewards are all equal are thrown away and others drawn (DAPO, arXiv 2503.14476, section 3.2).  The judge is the learned matcher of
SRRL at 0.5, never the inspector.  The paper's sees the picture only, and so words drift away from what is drawn; `reads` asks, besides, that a learned captioner
finds no word of the rationale unlikely in the picture.  Without rationales this is AR-GRPO (arXiv 2508.06924) with another reward.

Differs from the released code: tokens that the policy did not choose (a forced BOI, what fills up) carry no gradient; updates see the very distribution
that was sampled from; a missing judge is an error (there rewards are then random).  By default words and image tokens have a mean each in L (`modality`), as
64 image tokens outweigh twenty words; beta is not 0, and true pictures are recalled (InstructGPT's PPO-ptx, arXiv 2203.02155, eq. 2): what is not
asked for in training is otherwise forgotten, and held-out prompts ask for it (docs/log.md, thirteenth and eighteenth session).

    python train.py reason-grpo
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..diffusion.reflection import ACCEPT
from ..models.reasongen import ReasonGen, Sampled, SamplingConfig
from ..models.tokenizer import EOS, trim
from ..pipeline import ReasonPipeline
from ..pretrain.optimise import lr_factor, set_lr
from ..pretrain.sft import Lessons, ReasonTraining, lesson_loss
from ..rl.advantage import group_advantage, zero_variance_groups
from ..rl.entropy import AdaptiveEntropy, EntropyConfig, entropy_of
from ..rl.policy import ppo_clip, token_kl
from ..rl.rewards import Reward, inspector_reward
from ..run import Run
from ..streams import rng

EXPECTED = 0.05  # least probability that a word of a kept rationale has; the first of four things in any order, in one of three styles, has a twelfth


Prompts = Callable[[int, int, int], list[str]]  # how many, of which iteration, of which draw in it


@dataclass(frozen=True)
class ReasonRLConfig:
    iterations: int = 80
    prompts: int = 16  # groups that an iteration learns from
    group: int = 8  # G, samples of a prompt
    most: int = 4  # draws of prompts an iteration at most, until enough groups are mixed
    updates: int = 2  # optimiser steps an iteration, each on its share of the groups
    lr: float = 3e-4  # of AdamW, peak; cosine to zero after a warm-up of 5 %
    clip: float = 0.2  # e, on the ratio of a token's probabilities
    beta: float = 0.02  # weight of the KL to the model before RL, nats a token; the paper has none
    modality: bool = True  # words and image tokens with a mean each; the paper has one over all
    adaptive: bool = True  # hold the entropies at their targets
    text: EntropyConfig = field(default_factory=lambda: EntropyConfig(target=0.11))  # what SFT ends with
    image: EntropyConfig = field(default_factory=lambda: EntropyConfig(target=0.19))
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.8))
    grad_norm: float = 1.0  # largest norm of a gradient
    reads: bool = True  # a picture must also keep what its rationale promises; the paper's need not
    recall: float = 0.3  # weight of the loss of stage 1 on true pictures, gamma of InstructGPT's eq. (2); the paper has none
    lessons: ReasonTraining = field(
        default_factory=lambda: ReasonTraining(pictures=6_000, batch=48, altered=0.5, related=0.4)
    )  # what is recalled; with rationales if the model writes them; steps, lr and told have no meaning here
    freed: bool = False  # let a model trained without rationales write words: GRPO without SFT
    controls: bool = True  # measure best-of-N beside

    def __post_init__(self) -> None:
        if min(self.iterations, self.prompts, self.most, self.updates) < 1:
            raise ValueError("iterations, prompts, most and updates must be at least 1")
        if self.group < 2:
            raise ValueError(
                f"group is {self.group}: a sample is compared with others of its prompt, so at least 2"
            )
        if self.recall < 0:
            raise ValueError(f"recall is {self.recall}, a weight of 0 or more is wanted")
        if self.updates > self.prompts:
            raise ValueError(f"{self.updates} updates cannot share {self.prompts} groups")


class Groups(NamedTuple):
    """Samples to learn from: n prompts, G of each, one after the other."""

    texts: list[str]  # n
    drawn: Sampled  # n*g
    rewards: Tensor  # (n g), 0 or 1


class Tally(NamedTuple):
    """What an iteration drew, and threw away."""

    drawn: int  # groups
    mixed: int  # of these, whose rewards differ
    reward: float  # mean over all that was drawn
    right: float  # the same by the inspector
    words: float  # chosen a sample


def collect_groups(
    painter: ReasonPipeline,
    judge: Reward,
    prompts: Prompts,
    config: ReasonRLConfig,
    step: int,
    generator: Generator,
    captioner: Reward | None = None,
) -> tuple[Groups | None, Tally]:
    """Draw until there are enough groups that teach something, or `most` times.  -> those, None if there is none

    After the first draw only as many prompts are drawn as should do, by the share of mixed groups so far.
    """
    kept: list[Groups] = []
    drawn = mixed = 0
    rewards, right, words = [], [], []
    for number in range(config.most):
        wanted = config.prompts - mixed
        asked = math.ceil(wanted * drawn / mixed) if mixed else config.prompts
        texts = prompts(min(asked, config.prompts), step, number)
        each = [t for t in texts for _ in range(config.group)]
        out = painter.sample(each, config.sampling, generator)
        images = painter.pictures(out.codes)
        accepted = judge(images, each) >= ACCEPT  # (n*g)
        if captioner:
            accepted &= captioner(images, painter.rationales(out)) >= EXPECTED
        R = accepted.float().view(-1, config.group)  # (n g)
        rewards.append(R.flatten()), words.append(out.chosen.sum(1).float())
        right.append(inspector_reward(images.cpu(), each))
        rows = (~zero_variance_groups(R)).nonzero().flatten()[:wanted]
        drawn, mixed = drawn + len(texts), mixed + len(rows)
        flat = (rows[:, None] * config.group + torch.arange(config.group, device=rows.device)).flatten()
        kept.append(Groups([texts[i] for i in rows.tolist()], Sampled(*(v[flat] for v in out)), R[rows]))
        if mixed == config.prompts:
            break
    tally = Tally(drawn, mixed, *(torch.cat(v).mean().item() for v in (rewards, right, words)))
    if not mixed:
        return None, tally
    together = Sampled(*(torch.cat(parts) for parts in zip(*(g.drawn for g in kept))))
    return Groups([t for g in kept for t in g.texts], together, torch.cat([g.rewards for g in kept])), tally


class ReasonStats(NamedTuple):
    loss: float
    first_ratio: float  # largest |rho - 1| before the first update: 0, or something is wrong
    clipped: float  # share of the tokens beyond the clip
    kl: float  # nats a token from the model before RL
    text_entropy: float  # nats a token
    image_entropy: float
    grad_norm: float


def token_shares(chosen: Tensor, image_tokens: int, modality: bool) -> tuple[Tensor, Tensor]:
    """How much each token counts in the loss: all alike, or each modality half.

    Shapes: chosen (b r) bool -> (b r), (b n); together they sum to 1
    """
    words, pixels = int(chosen.sum()), len(chosen) * image_tokens
    text = 0.5 / max(1, words) if modality else 1 / (words + pixels)
    image = (0.5 if words else 1.0) / pixels if modality else 1 / (words + pixels)
    return text * chosen, torch.full((len(chosen), image_tokens), image, device=chosen.device)


def update_painter(
    painter: ReasonPipeline, reference: ReasonGen, optimizer: torch.optim.Optimizer, groups: Groups,
    entropies: tuple[AdaptiveEntropy, AdaptiveEntropy], config: ReasonRLConfig, generator: Generator,
    known: Lessons | None = None,
) -> ReasonStats:  # fmt: skip
    """`config.updates` optimiser steps, each on its share of the groups."""
    model, n, g = painter.model, len(groups.texts), config.group
    device = groups.rewards.device
    each = [t for t in groups.texts for _ in range(g)]
    prompts = trim(painter.tokenizer(each).to(device), EOS)  # (n*g p)
    written = trim(groups.drawn.rationale, model.config.boi)  # (n*g r)
    advantage = group_advantage(groups.rewards).flatten()  # (n*g)
    order = torch.randperm(n, generator=generator)
    shares = [(i[:, None] * g + torch.arange(g)).flatten().to(device) for i in order.chunk(config.updates)]
    given = [(prompts[rows], written[rows], groups.drawn.codes[rows]) for rows in shares]
    with torch.no_grad():  # in one pass each, as below: the cache rounds otherwise than the whole does
        old = [torch.cat(model.log_probs(*tokens, config.sampling), 1) for tokens in given]  # (m r+n) each
        ref = [torch.cat(reference.log_probs(*tokens, config.sampling), 1) for tokens in given]
    totals, first = [], 0.0
    for number, (rows, tokens) in enumerate(zip(shares, given)):
        (_, words, codes), chosen = tokens, groups.drawn.chosen[rows, : written.shape[1]]
        choices = model.distributions(*tokens, config.sampling)
        now = torch.cat(model.chosen(choices, words, codes), 1)  # (m r+n)
        weight = torch.cat(token_shares(chosen, codes.shape[1], config.modality), 1)  # (m r+n)
        counted = weight > 0
        A = advantage[rows, None].expand_as(now)
        stats = ppo_clip(now[counted], old[number][counted], A[counted], config.clip, weight[counted])
        kl = (weight[counted] * token_kl(now[counted], ref[number][counted])).sum()
        every = torch.ones_like(codes, dtype=torch.bool)
        # of a token: of its form, and of its colours given the form that was drawn
        of_image = mean_entropy(choices.forms, every) + mean_entropy(choices.colors, every)
        H = mean_entropy(choices.text, chosen), of_image
        loss = stats.loss + config.beta * kl
        if config.adaptive:
            loss = loss + sum(control.alpha * h for control, h in zip(entropies, H))
        if known:
            loss = loss + config.recall * lesson_loss(model, known, config.lessons, device, generator)[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of update {number} is not finite; lower lr, {config.lr} now"
            )
        optimizer.step()
        if config.adaptive:
            for control, h in zip(entropies, H):
                control.step(h.item())
        if number == 0:
            first = (now - old[number])[counted].detach().abs().max().expm1().item()
        clipped = (stats.clip_high + stats.clip_low).item()
        totals.append((loss.item(), clipped, kl.item(), H[0].item(), H[1].item(), norm.item()))
    loss, clipped, kl, text, image, norm = (sum(v) / len(v) for v in zip(*totals))
    return ReasonStats(loss, first, clipped, kl, text, image, norm)


def mean_entropy(log_prob: Tensor, mask: Tensor) -> Tensor:
    """Shapes: log_prob (m t v), mask (m t) -> () nats a token"""
    return entropy_of(log_prob[mask]).mean() if mask.any() else log_prob.new_zeros(())


def train_reason_grpo(
    config: ReasonRLConfig, seed: int, painter: ReasonPipeline, judge: Reward, prompts: Prompts, run: Run,
    captioner: Reward | None = None, known: Lessons | None = None,
) -> ReasonGen:  # fmt: skip
    """Reinforce thinking and drawing, and recall what is known.  -> the model"""
    reference = copy.deepcopy(painter.model).eval().requires_grad_(False)
    model = painter.model.requires_grad_(True)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=1e-2)
    entropies = AdaptiveEntropy(config.text).to(device), AdaptiveEntropy(config.image).to(device)
    networks = {"model": model, "text_entropy": entropies[0], "image_entropy": entropies[1]}
    memory = {"judged": 0, "tokens": 0}
    for step in run.steps("reason-grpo", config.iterations, networks, optimizer, memory=memory):
        set_lr(optimizer, config.lr * lr_factor(step, config.iterations))
        chance = rng(seed, "reason-grpo", step)
        groups, tally = collect_groups(painter, judge, prompts, config, step, chance, captioner)
        samples = tally.drawn * config.group
        memory["judged"] += samples
        memory["tokens"] += round(samples * (tally.words + model.config.side**2))
        stats = {}
        if groups:
            learnt = update_painter(
                painter, reference, optimizer, groups, entropies, config, rng(seed, "update", step), known
            )
            stats = learnt._asdict()
        values = {
            "reward": tally.reward,
            "right": tally.right,
            "words": tally.words,
            "groups": tally.drawn,
            "mixed": tally.mixed,
        }
        values |= {"alpha_text": entropies[0].alpha, "alpha_image": entropies[1].alpha}
        values |= {"judge_calls": memory["judged"], "tokens": memory["tokens"], **stats}
        run.log("reason-grpo", step, **values)
        run.bar.set_postfix(
            reward=f"{tally.reward:.2f}", right=f"{tally.right:.2f}", mixed=f"{tally.mixed}/{tally.drawn}"
        )
    return model.eval().requires_grad_(False)
