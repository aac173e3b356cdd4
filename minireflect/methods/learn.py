"""Train a UNet on the pictures of an iteration.  SRRL and RL-RIG's editor share this learner.

An objective is a function (learner, rollout, generator) that takes the optimiser steps of one iteration and
returns statistics.  To add one, write the function and enter it in OBJECTIVES.

    d = eps_theta - eps_base at (x_t, t, c), where x_t is a sampled picture with new noise n

    grpo      L = w(t) mean[ 2 A d (eps_base - n) + b d^2 ]
    regress   the same with A = 1 and b = 1, on pictures drawn in proportion to their reward:
              L = w(t) mean[ (eps_theta - n)^2 ] + const, reward-weighted regression (Peters & Schaal 2007)
    ppo       PPO-clip on the steps of the sampler (SRRL E6 to E8); plus `grpo` with A = 0, if b > 0

`grpo` is the policy gradient on the forward process: the gradient of a sampler's step, averaged over the
noise that does not reach the picture.  The term with b pulls the model to the base.  Two related objectives
are DiffusionNFT (arXiv 2509.16117) and AWM (arXiv 2509.25050).  With g = eps_base - n, DiffusionNFT is

    r (g + b d)^2 + (1 - r) (g - b d)^2 = const + 2 b (2r - 1) g d + b^2 d^2

so it has 2r - 1 in place of A.  AWM has a clip in place of b.

Below t = anchor_below, every objective has A = 0 and b = 1, so the model keeps the details of the base.
Otherwise it would learn the small defects of its own pictures.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from tyro.conf import Suppress

from ..diffusion.ddim import DDIMStep, ddim_step
from ..diffusion.sample import evaluations
from ..diffusion.schedule import Schedule, level_weight
from ..models.lora import adapters, lora_layers, remove_lora
from ..models.unet import UNet
from ..parallel import MAX, share, sum_gradients, total
from ..pipeline import LatentDiffusion
from ..ranges import Checked, Count, Positive, Range, Share, Weight
from ..rl import advantage as adv
from ..rl.policy import gaussian_kl, ppo_clip
from ..streams import normal, sent
from ..training import adamw, check_gradient, set_lr, take_step
from .rollout import Rollout

WARMUP = 3  # iterations of linear warm-up; without it, the first steps destroy the model
WEIGHT_DECAY = 1e-4  # of AdamW
FLOOR = 0.5  # regress: `floor` of `reward_weights`
MAX_WEIGHT = 20.0  # `cap` of `level_weight`
ANCHORED = 0.2  # share of the noise levels of a batch that are below `anchor_below`
MIN_ADVANTAGE = 0.05  # grpo: pictures with a smaller |advantage| are not learnt from
TRAINED = 0.5  # ppo: share of the denoising steps that an iteration trains on, chosen at random
MIN_SIGMA = 0.1  # ppo: steps with less noise are not trained, see `steps_to_train`
# Scale of a loss in float16, where gradients below 6e-8 become 0.  Without it, gradients of a log-probability
# that is averaged over 16,384 dimensions would be 0.
HALF_SCALE = 2.0**16
# Options that an objective does not read.  A recipe may set them, the command line refuses them.
UNREAD = {"grpo": ("clip_range", "ratio", "kl"), "ppo": ("replay",)}
UNREAD["regress"] = ("advantage", "pull", *UNREAD["grpo"])


@dataclass(frozen=True)
class LearnConfig(Checked):
    # loss, see methods/learn.py
    objective: Literal["grpo", "regress", "ppo"] = "grpo"
    # how rewards are compared
    advantage: Literal["shrunk", "group", "history"] = "shrunk"
    # learning rate of AdamW; 3e-5 for ppo
    lr: Weight = 2e-4
    # share of iterations at the end where lr decays
    cooldown: Share = 0.3
    # optimiser steps per iteration
    updates: Count = 8
    # pictures per optimiser step
    batch: Count = 64
    # iterations whose pictures are learnt from
    replay: Count = 4
    # b, weight of the pull to the base
    pull: Weight = 0.3
    # noise level t below which the base is imitated
    anchor_below: Annotated[int, Range(0, 999)] = 150
    # added to the std of a group's rewards
    std_floor: Annotated[Weight, Suppress] = 0.1
    # ppo: clip e of the ratio of mean log-densities
    clip_range: Positive = 1e-2
    # ppo: ratio as in PPO, or GRPO-Guard
    ratio: Literal["plain", "guard"] = "plain"
    # ppo: weight of the KL per dimension
    kl: Weight = 0.0

    def require(self) -> None:
        for name in ("kl", "ratio") if self.objective != "ppo" else ():  # no recipe sets these for another
            if getattr(self, name) != getattr(LearnConfig, name):
                raise ValueError(f"{name} has no effect with objective {self.objective}; use objective ppo")

    def lr_factor(self, step: int, iterations: int) -> float:
        """The factor of the learning rate in iteration `step`: linear warm-up, 1, and linear decay to 0."""
        left = (iterations - step) / (self.cooldown * iterations) if self.cooldown else 1.0
        return min(1.0, (step + 1) / WARMUP, left)


class Replay(nn.Module):
    """The pictures of the latest iterations, with their prompts, and their advantages or weights.

    It is a module, so that a run saves it.  The latents are on the device of the policy.  The other tensors
    are on the CPU, where the pictures of a batch are drawn.
    """

    def __init__(
        self, iterations: int, pictures: int, latent_shape: tuple[int, ...], tokens: int, device: torch.device
    ) -> None:
        super().__init__()
        self.iterations, size = iterations, iterations * pictures
        self.register_buffer("latents", torch.zeros(size, *latent_shape, device=device))  # (m c h w)
        self.register_buffer("ids", torch.zeros(size, tokens, dtype=torch.long))  # (m t)
        self.register_buffer("values", torch.zeros(size))  # (m) advantage or weight; 0 is not learnt from
        self.register_buffer("born", torch.zeros(size, dtype=torch.long))  # (m) iteration of each picture
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # number of pictures ever added
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))

    def add(self, latents: Tensor, ids: Tensor, values: Tensor) -> None:
        """Add the pictures of one iteration, and set the values of old pictures to 0.

        Shapes: latents (b c h w), ids (b t), values (b)
        """
        rows = (self.count + torch.arange(len(latents))) % len(self.values)  # (b)
        self.latents[sent(rows, self.latents.device)] = latents.to(self.latents)
        self.ids[rows], self.values[rows] = ids, values
        self.born[rows] = self.iteration
        self.count += len(latents)
        self.iteration += 1
        self.values[self.born < self.iteration - self.iterations] = 0


class UpdateStats(NamedTuple):
    """Statistics of the updates of an iteration; None if the objective does not have the statistic."""

    loss: float
    kl: float  # KL to the base in nats per picture, see `path_kl`
    grad_norm: float  # mean over the updates, before clipping
    updates: int  # number of optimiser steps
    evaluations: int  # of the UNet: of the policy (with a backward pass) and of the base
    clip_high: float | None = None  # share of samples with A > 0 beyond the upper clip
    clip_low: float | None = None  # share of samples with A < 0 beyond the lower clip
    log_ratio: float | None = None  # largest |log-ratio| of all updates, in nats of the whole latent
    first_ratio: float | None = None  # exp(largest |log-ratio|) - 1 before the first update; must be 0


class Learner:
    """A policy with its base, its optimiser and its replay."""

    def __init__(self, pipe: LatentDiffusion, config: LearnConfig, guidance: float, pictures: int) -> None:
        """Train the UNet of `pipe`, which is the policy, or its LoRA adapters if it has some.

        guidance: of the branches in sampling.
        pictures: the largest number of pictures of an iteration.
        """
        self.pipe, self.config, self.guidance = pipe, config, guidance
        self.base = reference(pipe.unet)  # the policy before training, frozen
        trained = adapters(pipe.unet) if lora_layers(pipe.unet) else pipe.unet
        self.networks = {"unet": trained.requires_grad_(True)}  # saved by a run
        if config.objective != "ppo":
            shapes = pipe.latent_shape, pipe.tokenizer.length
            self.networks["replay"] = Replay(config.replay, pictures, *shapes, pipe.device)
        self.optimizer = adamw(trained.parameters(), lr=config.lr, weight_decay=WEIGHT_DECAY)
        self.history = adv.RewardHistory()  # past rewards, for the advantage "history" (E6)

    @property
    def scale(self) -> float:
        """The factor of a loss before its backward pass; not 1 if the UNet computes in float16."""
        return HALF_SCALE if next(self.pipe.unet.parameters()).dtype == torch.float16 else 1.0

    def backward(self, loss: Tensor) -> None:
        """Add the scaled gradient of a part of the loss.  Does nothing if gradients are disabled."""
        if torch.is_grad_enabled():
            (loss * self.scale).backward()

    def step(self) -> Tensor:
        """An optimiser step with a clipped gradient.  -> its norm before clipping ().  See `take_step`."""
        sum_gradients(p for group in self.optimizer.param_groups for p in group["params"])
        for p in self.pipe.unet.parameters() if self.scale != 1 else ():
            if p.grad is not None:
                p.grad /= self.scale
        return take_step(self.optimizer, self.scale != 1)

    def parts(self, n: int) -> list[slice]:
        """This process's share of `n` pictures, divided into the same micro-batches as in sampling."""
        m, own = self.pipe.micro_batch or n, share(n, self.pipe.micro_batch or 1)
        return [slice(i, min(i + m, own.stop)) for i in range(own.start, own.stop, m)]


def learn(learner: Learner, out: Rollout, lr_factor: float, generator: Generator) -> UpdateStats:
    """Learn from the rollout of one iteration.  Raises FloatingPointError if a gradient is not finite."""
    set_lr(learner.optimizer, learner.config.lr * lr_factor)
    stats = OBJECTIVES[learner.config.objective](learner, out, generator)
    check_gradient(stats.grad_norm, learner.optimizer, learner.scale != 1)
    return stats


def reference(unet: UNet) -> UNet:
    """A frozen copy of the UNet.  With LoRA, it has no adapters, and shares the frozen weights."""
    shared = {id(p): p for p in unet.parameters() if not p.requires_grad} if lora_layers(unet) else {}
    return remove_lora(copy.deepcopy(unet, shared)).eval().requires_grad_(False)


def levels(schedule: Schedule, n: int, below: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw noise levels t for n pictures by importance sampling, with a loss weight for each.

    A weighted mean over them estimates the mean over uniform levels, weighted by `level_weight`, with less
    variance.  A share ANCHORED of the levels is uniform below `below`; the others are drawn in proportion to
    `level_weight`.  Sampling is stratified: there is one level in each n-th part of the probability.
    -> t (n) long, weight (n)
    """
    T = schedule.config.train_steps
    weight = level_weight(schedule, torch.arange(T), MAX_WEIGHT).double()  # (T)
    low = torch.arange(T) < below
    anchored = ANCHORED if below else 0.0
    chance = torch.where(low, anchored / max(1, below), (1 - anchored) * weight / weight[~low].sum())
    u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    t = torch.searchsorted(chance.cumsum(0), u.double()).clamp(max=T - 1)
    return t, (weight / (T * chance))[t].float()


def forward_gradient(
    learner: Learner, x_0: Tensor, ids: Tensor, A: Tensor, b: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Add the gradient of `grpo`'s loss, w(t) mean[ 2 A d (eps_base - n) + b d^2 ], for these pictures.

    -> the loss () and the mean `path_kl` ()
    Shapes: x_0 (b c h w), ids (b s), A (b)
    """
    pipe, below = learner.pipe, learner.config.anchor_below
    t, weight = (sent(v, x_0.device) for v in levels(pipe.schedule, len(x_0), below, generator))
    noise = normal(x_0.shape, generator, x_0.device)  # (b c h w)
    x_t, above = pipe.schedule.add_noise(x_0, t, noise), t >= below
    A, pull = torch.where(above, A, 0.0), torch.where(above, b, 1.0)  # (b) each
    loss_sum = kl = torch.zeros((), device=pipe.device)
    for part in learner.parts(len(x_0)):
        with torch.no_grad():
            context = pipe.text_encoder(ids[part], pipe.clip_skip)  # (b s d)
            base = replace(pipe, unet=learner.base).eps(context, False)(1.0)(x_t[part], t[part])  # (b c h w)
        d = pipe.eps(context, False)(1.0)(x_t[part], t[part]) - base
        gain = (d * (base - noise[part])).flatten(1).mean(1)  # (b)
        loss = (weight[part] * (2 * A[part] * gain + pull[part] * (d**2).flatten(1).mean(1))).sum() / len(x_0)
        learner.backward(loss)
        uniform = weight[part] / level_weight(pipe.schedule, t[part], MAX_WEIGHT)
        kl = kl + (uniform * path_kl(pipe.schedule, t[part], d.detach())).sum() / len(x_0)
        loss_sum = loss_sum + loss.detach()
    return tuple(total(torch.stack([loss_sum, kl])))


def learn_from_replay(
    learner: Learner, chance: Tensor, A: Tensor, b: float, generator: Generator
) -> UpdateStats:
    """`updates` optimiser steps, each on `batch` pictures of the replay.

    chance: probability of each picture, up to a factor; no steps are taken if all are 0.
    Shapes: chance (m), A (m)
    """
    config, replay = learner.config, learner.networks["replay"]
    updates, stats = config.updates if chance.any() else 0, []
    for _ in range(updates):
        rows = torch.multinomial(chance, config.batch, replacement=True, generator=generator)
        learner.optimizer.zero_grad(set_to_none=True)
        rows, ids, A_rows = (sent(v, learner.pipe.device) for v in (rows, replay.ids[rows], A[rows]))
        found = forward_gradient(learner, replay.latents[rows], ids, A_rows, b, generator)
        stats.append(torch.stack([*found, learner.step()]))
    means = torch.stack(stats).mean(0).tolist() if stats else [0.0] * 3  # the only wait for the device
    return UpdateStats(*means, updates, 2 * updates * config.batch)


def remember(learner: Learner, out: Rollout, values: list[Tensor]) -> Replay:
    """Add the pictures of all rounds to the replay.  Shapes: values (n*g) for each round"""
    replay, rounds = learner.networks["replay"], out.rounds
    texts = [text for round_ in rounds for text in out.texts_of(round_)]
    latents = torch.cat([round_.path.latents[:, -1] for round_ in rounds])  # (b c h w)
    replay.add(latents, learner.pipe.tokenizer(texts), torch.cat(values))
    return replay


def grpo(learner: Learner, out: Rollout, generator: Generator) -> UpdateStats:
    """The policy gradient on the forward process, from the pictures of the latest iterations.

    It does not depend on how a picture was sampled, so pictures of later rounds also improve round 0.
    """
    A = advantages(out, learner.config, learner.history)
    replay = remember(learner, out, [a.clamp(-1, 1) for a in A])
    worth = (replay.values.abs() > MIN_ADVANTAGE).float()
    return learn_from_replay(learner, worth, replay.values, learner.config.pull, generator)


def regress(learner: Learner, out: Rollout, generator: Generator) -> UpdateStats:
    """Reward-weighted regression.  The pictures of all rounds of a prompt form one group."""
    weights = adv.reward_weights(out.rewards.flatten(1), FLOOR).view_as(out.rewards)  # (n k g)
    replay = remember(learner, out, out.by_round(weights))
    return learn_from_replay(learner, replay.values, torch.ones_like(replay.values), 1.0, generator)


def path_kl(schedule: Schedule, t: Tensor, change: Tensor) -> Tensor:
    """Estimate the KL between two ancestral samplers, in nats per picture, from one level for each sample.

    One step of DDPM with variance beta has  KL = beta / (2 alpha (1 - abar)) |change|^2  (DDPM 12).  T times
    its mean over uniform levels t is the KL of the whole path.
    change: the difference of the predicted noise.
    Shapes: t (b), change (b c h w) -> (b)
    """
    abar = sent(schedule.abar, t.device)
    before = torch.where(t > 0, abar[(t - 1).clamp(min=0)], 1.0)
    alpha = abar[t] / before  # (b)
    step = (1 - alpha) / (2 * alpha * (1 - abar[t])) * (change**2).flatten(1).sum(1)
    return schedule.config.train_steps * step


def advantages(out: Rollout, config: LearnConfig, history: adv.RewardHistory | None) -> list[Tensor]:
    """The advantage of every branch: a tensor (n*g) for each round.

    The pictures of all rounds of a prompt form one group, so a refused picture is compared with pictures of
    later rounds.  With advantage "history", as in the paper (E6 to E8), the rewards of a round are compared
    with those of its prompt's family in this round and in the history.
    """
    rewards = out.rewards.flatten(1)  # (n k*g)
    if config.advantage != "history":
        of_group = config.advantage == "group"
        A = adv.group_advantage(rewards, config.std_floor) if of_group else adv.shrunk_advantage(rewards)
        return out.by_round(A.view_as(out.rewards))
    keys = [[(out.families or out.texts)[i] for i in r.rows.tolist()] for r in out.rounds]
    scores = [adv.history_advantage(history, k, r.rewards) for k, r in zip(keys, out.rounds)]
    for row_keys, round_ in zip(keys, out.rounds):
        history.add(row_keys, round_.rewards)
    return [(adv.advantage_weights(z) * adv.select_best_worst(z)).flatten() for z in scores]


Pairs = list[tuple[int, int]]  # round k, denoising step i


def steps_to_train(out: Rollout, advantage: list[Tensor], updates: int, generator: Generator) -> list[Pairs]:
    """Choose a random share TRAINED of the (round, step) pairs; a list of pairs for each optimiser step.

    Rounds whose advantages are all 0 are left out, and so are steps with sigma <= MIN_SIGMA.  A change of eps
    moves the mean of a step by c standard deviations.  With ten steps, |c| is between 0.97 and 1.32, but 8.3
    at the step before the last (sigma 0.04): its gradient would dominate, and its KL would be 40 to 70 times
    as large.  A step with sigma 0 has no density at all.
    """
    trained = [(k, out.rounds[k].sigmas) for k, A in enumerate(advantage) if A.any()]
    pairs = [(k, i) for k, sigmas in trained for i, sigma in enumerate(sigmas) if sigma > MIN_SIGMA]
    order = torch.randperm(len(pairs), generator=generator)[: math.ceil(TRAINED * len(pairs))]
    return [[pairs[j] for j in chunk] for chunk in order.chunk(updates)] if len(order) else []


def score_step(learner: Learner, out: Rollout, k: int, i: int, part: slice, unet: UNet) -> DDIMStep:
    """Step i of the branches `part` of round k, with means and log-probabilities of this UNet.

    The batch is equal to that of the rollout, so that the policy that sampled it computes exactly the same
    log-probabilities again.
    """
    round_ = out.rounds[k]
    table, context = round_.table, out.context_of(round_)[part]  # (b t d)
    x, x_prev = (round_.path.latents[part, j].to(context.device) for j in (i, i + 1))  # (b c h w)
    eps = replace(learner.pipe, unet=unet).eps(context, False)(learner.guidance)(x, table.t[i])
    return ddim_step(x, eps, table.abar[i], table.abar_prev[i], round_.sigmas[i], x_prev)


def ppo(learner: Learner, out: Rollout, generator: Generator) -> UpdateStats:
    """PPO-clip on the steps of all rounds (E8), with the mean log-probability as in SRRL (E3).

    If `pull` is not 0, each optimiser step also has the loss of `pull_to_base`.
    """
    pipe, config, once = learner.pipe, learner.config, evaluations(learner.guidance)
    advantage = advantages(out, config, learner.history)
    chunks = steps_to_train(out, advantage, config.updates, generator)
    sums = torch.zeros(4, device=pipe.device)  # loss, the shares of both clips, evaluations
    norms, kls, ratios, first = [], [], [torch.zeros((), device=pipe.device)], None
    for chunk in chunks:
        samples = sum(int(advantage[k].count_nonzero()) for k, _ in chunk)  # number of (branch, step) pairs
        learner.optimizer.zero_grad(set_to_none=True)
        kls.append(pull_to_base(learner, out, generator))
        pieces = [(k, i, part) for k, i in chunk for part in learner.parts(len(advantage[k]))]
        for k, i, part in pieces:
            A = advantage[k][part]  # (b)
            used = A.nonzero().flatten()  # (n)
            if not len(used):
                continue
            rows, A, weight = sent(used, pipe.device), sent(A[used], pipe.device), len(used) / samples
            piece = learner, out, k, i, part
            path, now = out.rounds[k].path, score_step(*piece, pipe.unet)
            log_ratio = now.log_prob - path.log_probs[part, i]  # (b) nats
            if config.ratio == "guard":
                log_ratio = guarded(log_ratio, now, path.means[part, i])
            tempered = mean_of(log_ratio, pipe)[rows]
            stats = ppo_clip(tempered, torch.zeros_like(tempered), A, config.clip_range)
            loss = stats.loss * weight
            if config.kl > 0:
                with torch.no_grad():
                    mean = score_step(*piece, learner.base).mean
                kl = gaussian_kl(now.mean, mean, now.sigma)  # (b)
                loss = loss + config.kl * weight * mean_of(kl, pipe)[rows].mean()
            learner.backward(loss)
            ratios.append(log_ratio.detach().abs().max())
            sums[:3] += torch.stack([stats.loss.detach(), stats.clip_high, stats.clip_low]) * weight
            sums[3] += len(log_ratio) * once * (2 if config.kl > 0 else 1)
        first = torch.stack(ratios).max() if first is None else first
        norms.append(learner.step())
    if not chunks:
        return UpdateStats(0.0, 0.0, 0.0, 0, 0, 0.0, 0.0, 0.0, 0.0)
    largest = total(torch.stack([first, torch.stack(ratios).max()]), MAX)
    means = torch.stack([torch.stack(kls).mean(), torch.stack(norms).mean()])
    # `tolist` waits for the GPU, once per iteration
    kl, norm, first, ratio, *summed, spent = torch.cat([means, largest, total(sums)]).tolist()
    loss, high, low = (v / len(chunks) for v in summed)
    first, spent = math.expm1(min(first, 80.0)), round(spent) + 2 * config.batch * len(chunks)
    return UpdateStats(loss, kl, norm, len(chunks), spent, high, low, ratio, first)


def guarded(log_ratio: Tensor, now: DDIMStep, old_mean: Tensor) -> Tensor:
    """GRPO-Guard's log-ratio (arXiv 2510.22319): its mean is 0, and its scale is the same at all steps.

    With D = mean - old_mean and the step's noise n, log_ratio = n D / sigma - D^2 / (2 sigma^2), and the
    result is n D.
    Shapes: log_ratio (b), old_mean (b c h w) -> (b)
    """
    return (log_ratio + gaussian_kl(now.mean, old_mean, now.sigma)) * now.sigma


def pull_to_base(learner: Learner, out: Rollout, generator: Generator) -> Tensor:
    """Add the gradient of `grpo`'s loss with A = 0 on `batch` pictures of the rollout, unless `pull` is 0.

    -> the mean `path_kl` ()
    """
    texts = [text for round_ in out.rounds for text in out.texts_of(round_)]
    x_0 = torch.cat([round_.path.latents[:, -1] for round_ in out.rounds])  # (m c h w)
    rows = torch.randint(len(x_0), (learner.config.batch,), generator=generator)
    ids = sent(learner.pipe.tokenizer([texts[i] for i in rows.tolist()]), learner.pipe.device)
    b, none = learner.config.pull, torch.zeros(len(rows), device=learner.pipe.device)
    with torch.set_grad_enabled(b > 0):
        return forward_gradient(learner, x_0[sent(rows, x_0.device)], ids, none, b, generator)[1]


def mean_of(nats: Tensor, pipe: LatentDiffusion) -> Tensor:
    """Convert nats of a whole latent to nats per dimension.  Shapes: nats (b) -> (b)"""
    return nats / math.prod(pipe.latent_shape)


OBJECTIVES = {"grpo": grpo, "regress": regress, "ppo": ppo}
