"""ReasonGen-R1's second stage: GRPO on the tokens of rationales and images together.

Paper: Zhang et al. 2025, arXiv 2505.24875, section 3.2.  An optimiser step on tokens is in rl/tokens.py.

    for each iteration:
        until there are enough groups with different rewards:
            sample prompts, and G pairs (rationale, picture) for each
            R = 1 if the matching model accepts the picture and the captioner accepts the rationale, else 0
        A = (R - mean) / (std + e) within each group, the same for every token that the policy chose
        L = clipped policy gradient + beta KL(pi || pi_ref) + alpha_text H_text + alpha_image H_image
          + recall L_SFT, the loss of stage 1 on true pictures

Differs from the paper and its code:
- a learned captioner also judges whether the picture shows what the rationale says; the paper's reward reads
  only the picture, and rationales drift away from the pictures
- tokens that the policy did not choose (forced BOI, padding) have no gradient; in the paper's code they do
- L has one mean over text tokens and one over image tokens, because 64 image tokens would outweigh about
  twenty text tokens
- beta > 0, and the loss of stage 1 is added (PPO-ptx of InstructGPT, arXiv 2203.02155, equation 2); without
  them, the model forgets what only held-out prompts ask for (docs/log.md)
- groups with equal rewards are dropped, and others are sampled (DAPO, arXiv 2503.14476, section 3.2)

Without rationales, this is AR-GRPO (arXiv 2508.06924) with another reward.

    python train.py reason-grpo
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..models.reasongen import ReasonGen, Sampled, SamplingConfig
from ..models.tokenizer import EOS, trim
from ..models.transformer import Temperature
from ..parallel import share, spread, total, world
from ..pipeline import ACCEPT, ReasonPipeline, scored
from ..pretrain.sft import Examples, ReasonTraining, sft_loss
from ..ranges import Count, Positive, Weight
from ..rl.advantage import group_advantage, zero_variance_groups
from ..rl.collapse import statistics, watch
from ..rl.rewards import ACCEPT_WORD, Reward, inspector_reward
from ..rl.tokens import AdaptiveEntropy, TokenBatch, TokenConfig, entropy_of, token_step
from ..run import Job
from ..streams import rng, sent
from ..training import adamw, lr_factor, set_lr

MIX = {"recombined": 0.5, "related_captions": 0.4}  # options of the recalled pictures, see `training_pairs`
Prompts = Callable[[int, int, int], list[str]]  # number of prompts, iteration, attempt -> prompts


@dataclass(frozen=True)
class ReasonRLConfig(TokenConfig):
    # iterations, each sampling and an update
    iterations: Count = 80
    # groups that an iteration learns from
    prompts_per_iteration: Count = 16
    # attempts to sample enough groups with different rewards, at most
    max_resamples: Count = 4
    # optimiser steps per iteration, each on its share of the groups
    updates: Count = 2
    # peak learning rate of AdamW; cosine decay to zero after a warm-up of 5 %
    lr: Weight = 3e-4
    # target entropy H* of text tokens, in nats; the entropy at the end of stage 1
    text_entropy: Weight = 0.11
    # target entropy H* of image tokens, in nats
    image_entropy: Weight = 0.19
    # largest weight |alpha| of an entropy term, as in the paper; 0 for no entropy terms
    entropy_bound: Weight = 5e-3
    # learning rate of the weights alpha, as in the paper
    entropy_lr: Positive = 5e-4
    # temperature of sampling
    temperature: Temperature = 0.8
    # the picture must also show what its rationale says; not in the paper
    read_rationales: bool = True
    # weight of stage 1's loss on true pictures (gamma in InstructGPT, equation 2); not in the paper
    recall: Weight = 0.3
    # true pictures for stage 1's loss, rendered once
    recall_pictures: Count = 6_000
    # true pictures per optimiser step
    recall_batch: Count = 48
    # compute stage 1's loss in bfloat16
    bf16: bool = False

    def require(self) -> None:
        if (n := self.prompts_per_iteration) < self.updates:
            raise ValueError(f"prompts_per_iteration must be at least updates = {self.updates}, got {n}")

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(temperature=self.temperature)

    @property
    def examples(self) -> ReasonTraining:
        """The true pictures that are recalled."""
        return ReasonTraining(**MIX, pictures=self.recall_pictures, batch=self.recall_batch, bf16=self.bf16)


class Rewards(NamedTuple):
    """The learned rewards; a sample is right if both accept it."""

    picture: Reward  # probability that the picture fulfils its prompt
    rationale: Reward | None = None  # smallest probability of a word of the rationale, given the picture

    def __call__(self, images: Tensor, prompts: list[str], rationales: list[str]) -> Tensor:
        """1 if the sample is accepted, else 0.

        Shapes: images (b 3 h w), b prompts, b rationales -> (b)
        """
        accepted = scored(self.picture, images, prompts) >= ACCEPT
        if self.rationale:
            accepted &= scored(self.rationale, images, rationales) >= ACCEPT_WORD
        return accepted.float()


class Samples(NamedTuple):
    """n prompts and G samples of each; the samples of a prompt are next to each other."""

    prompts: list[str]  # n
    sampled: Sampled  # n*g
    rewards: Tensor  # (n g), 0 or 1, on the CPU


def sample_groups(
    pipe: ReasonPipeline, rewards: Rewards, ask: Prompts, config: ReasonRLConfig, step: int, noise: Generator
) -> tuple[Samples | None, dict[str, float]]:
    """Sample groups until enough of them are mixed, that is, have different rewards.

    There are at most `config.max_resamples` attempts.  After the first, the number of prompts is the number
    of missing groups, divided by the share of mixed groups so far.
    -> the mixed groups or None; and statistics of all samples: the number of groups, the number of mixed
    groups, the mean reward, the share that is right according to the inspector, and the text tokens that the
    policy chose per sample ("words"); `statistics` of the last attempt
    """
    asked: list[str] = []
    found = []  # of each attempt: samples, rewards (n g), verdicts of the inspector
    mixed = torch.zeros(0)  # indices of the mixed groups
    for number in range(config.max_resamples):
        wanted = config.prompts_per_iteration - len(mixed)
        n = math.ceil(wanted * len(asked) / len(mixed)) if len(mixed) else config.prompts_per_iteration
        texts = ask(min(n, config.prompts_per_iteration), step, number)
        each = [t for t in texts for _ in range(config.group)]
        sampled = pipe.sample(each, config.sampling, noise)
        images = spread(pipe.pictures, sampled.codes)
        R = spread(rewards, images, each, pipe.rationales(sampled)).cpu().view(-1, config.group)
        found.append((sampled, R, inspector_reward(images.cpu(), each)))
        asked += texts
        R = torch.cat([rows for _, rows, _ in found])  # (n g) so far
        mixed = (~zero_variance_groups(R)).nonzero().flatten()[: config.prompts_per_iteration]
        if len(mixed) == config.prompts_per_iteration:
            break
    parts, _, verdicts = zip(*found)
    sampled = Sampled(*map(torch.cat, zip(*parts)))  # (n*g)
    numbers = {"reward": R, "right": torch.cat(verdicts), "words": sampled.chosen.sum(1).float()}
    stats = {name: values.mean().item() for name, values in numbers.items()}
    stats |= {"groups": len(asked), "mixed": len(mixed), **statistics(images, images)}
    members = (mixed[:, None] * config.group + torch.arange(config.group)).flatten()
    of_mixed = Sampled(*(v[sent(members, v.device)] for v in sampled))
    return Samples([asked[i] for i in mixed.tolist()], of_mixed, R[mixed]) if len(mixed) else None, stats


class Learner(NamedTuple):
    """The model that is trained, its reference, and the state of the training."""

    pipe: ReasonPipeline
    reference: ReasonGen  # the model before RL, frozen
    optimizer: torch.optim.Optimizer
    entropies: tuple[AdaptiveEntropy, ...] = ()  # of text and image tokens; empty for no entropy terms
    examples: Examples | None = None  # true pictures for stage 1's loss


# The m samples of an optimiser step that this process has: (prompts (m p), rationales (m r), image tokens
# (m n)); whether the policy chose each text token, (m r) bool; the batch of tokens (m r+n)
Share = tuple[tuple[Tensor, Tensor, Tensor], Tensor, TokenBatch]


def token_shares(chosen: Tensor, image_tokens: int) -> Tensor:
    """The weight of each token in the loss, with sum 1.

    The text tokens have a total weight of 1/2, and so have the image tokens; without text, these have 1.
    Shapes: chosen (b r) bool -> (b r+n)
    """
    words = chosen.sum()
    image = torch.where(words > 0, 0.5, 1.0).expand(len(chosen), image_tokens) / (len(chosen) * image_tokens)
    return torch.cat([0.5 / words.clamp(min=1) * chosen, image], 1)


@torch.no_grad()
def shares_of(learner: Learner, samples: Samples, config: ReasonRLConfig, noise: Generator) -> list[Share]:
    """Divide the groups into random shares, one for each optimiser step, with the old log-probabilities."""
    pipe, models, g = learner.pipe, (learner.pipe.model, learner.reference), config.group
    written, all_chosen, codes = samples.sampled
    written, device = trim(written, pipe.model.config.boi), codes.device  # (n*g r)
    texts = [t for t in samples.prompts for _ in range(g)]
    prompts = sent(trim(pipe.tokenizer(texts), EOS), device)  # (n*g p)
    advantage = sent(group_advantage(samples.rewards).flatten(), device)  # (n*g)
    shares = []
    for groups in torch.randperm(len(samples.prompts), generator=noise).chunk(config.updates):
        rows = sent((groups[:, None] * g + torch.arange(g)).flatten(), device)  # (m) of all processes
        chosen, own = all_chosen[rows, : written.shape[1]], share(len(rows))
        weight = token_shares(chosen, codes.shape[1])[own]  # (m r+n)
        rows, chosen = rows[own], chosen[own]
        given = prompts[rows], written[rows], codes[rows]
        # not those of sampling: its cache rounds differently from `update`, so the first ratio would not be 1
        old, reference = (torch.cat(m.log_probs(*given, config.sampling), 1) for m in models)
        shares.append((given, chosen, TokenBatch(old, reference, advantage[rows], weight)))
    return shares


def update(learner: Learner, samples: Samples, config: ReasonRLConfig, noise: Generator) -> dict[str, float]:
    """`config.updates` optimiser steps, each on its share of the groups.  -> their mean statistics

    `clipped` is the share of tokens beyond the clip; `first_ratio` is `TokenStats.ratio_error` of the first
    step, which must be 0; KL and entropies are in nats per token.
    """
    model, rows = learner.pipe.model, []
    for given, chosen, tokens in shares_of(learner, samples, config, noise):
        choices = model.choices(*given, config.sampling)
        now = torch.cat(model.chosen(choices, *given[1:]), 1)  # (m r+n)
        # an image token is a form, and colours given that form, so their entropies add up
        nats = entropy_of(choices.text) * chosen, entropy_of(choices.forms) + entropy_of(choices.colors)
        counts = total(torch.stack([chosen.sum().float(), now.new_full((), nats[1].numel())])).clamp(min=1)
        H = torch.stack([v.sum() for v in nats]) / counts  # (2) this process's part of the mean entropies
        more = [sum(control.alpha * h for control, h in zip(learner.entropies, H))]
        if learner.examples:  # every process has the same pictures
            recalled, _ = sft_loss(model, learner.examples, config.examples, noise)
            more.append(config.recall / world() * recalled)
        stats = token_step(now, tokens, learner.optimizer, config.clip_range, config.beta, *more)
        entropies = total(H.detach()).tolist()
        for control, h in zip(learner.entropies, entropies):
            control.step(h)
        clipped = stats.clip_high + stats.clip_low
        rows.append((stats.total, clipped, stats.kl, *entropies, stats.grad_norm, stats.ratio_error))
    names = ("loss", "clipped", "kl", "text_entropy", "image_entropy", "grad_norm")
    means = {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows))}
    return means | {"first_ratio": rows[0][-1]}


def train_reason_grpo(
    config: ReasonRLConfig, pipe: ReasonPipeline, rewards: Rewards, prompts: Prompts,
    examples: Examples | None, job: Job,
) -> ReasonGen:  # fmt: skip
    """Train the model by GRPO.  `examples` are true pictures for stage 1's loss, or None.  -> the model"""
    reference = copy.deepcopy(pipe.model).eval().requires_grad_(False)
    model = pipe.model.requires_grad_(True)
    optimizer = adamw(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=1e-2)
    if config.group < world():
        raise ValueError(f"--group must be at least the number of processes, {world()}; got {config.group}")
    targets, limits = (config.text_entropy, config.image_entropy), (config.entropy_bound, config.entropy_lr)
    text, image = (AdaptiveEntropy(target, *limits) for target in targets)
    learner = Learner(pipe, reference, optimizer, (text, image) if config.entropy_bound else (), examples)
    networks = {"model": model, "text_entropy": text, "image_entropy": image}
    memory: dict = {"calls": 0, "tokens": 0, "watch": {}}
    for step in job.run.steps("reason-grpo", config.iterations, networks, optimizer, memory=memory):
        set_lr(optimizer, config.lr * lr_factor(step, config.iterations))
        noise = rng(job.seed, "reason-grpo", step)
        samples, values = sample_groups(pipe, rewards, prompts, config, step, noise)
        if samples:
            values |= update(learner, samples, config, rng(job.seed, "update", step))
        number = values["groups"] * config.group
        memory["calls"] += number
        memory["tokens"] += round(number * (values["words"] + model.config.side**2))
        values |= {"alpha_text": text.alpha, "alpha_image": image.alpha}
        if samples and job.run.tracking:
            job.run.show("reason-grpo", step, pipe.pictures(samples.sampled.codes[:8]))
        values["collapse"] = watch(config, job.run, memory["watch"], values)
        job.run.log("reason-grpo", step, **values, reward_calls=memory["calls"], tokens=memory["tokens"])
        shown = "reward {reward:.2f}, right {right:.2f}, mixed {mixed}/{groups}"
        job.run.bar.set_postfix_str(shown.format(**values))
    return model.eval().requires_grad_(False)
