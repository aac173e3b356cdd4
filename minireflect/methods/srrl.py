"""SRRL: self-reflective reinforcement learning (Pan et al. 2025, arXiv 2505.22407).  With no rounds it is DDPO.

A whole denoising is one thought; between thoughts the model looks at its picture and turns it back into noise.

    for each prompt c:  x_T^0 ~ N(0, I)
        for round k = 0 .. K:
            draw G branches  x_T^k -> x_0                      eta > 0: every step is an action with a density (E2, E3)
            score them; re-noise the best to x_T^(k+1)         guidance w_renoise < w_denoise writes c into the noise (E4)
    learn from all rounds, by one of two objectives
        ppo      A = GRPO or history z-score within each group (E6, E7), summed over rounds:
                 L = mean max(-A rho, -A clip(rho, 1 - e, 1 + e)),  rho = exp(l_new - l_old)       (E8)
        regress  w = r / sum of the prompt's r:  L = sum w |eps - eps_theta(x_t, t, c)|^2, x_t = x_0 noised anew

`ppo` is the paper's and asks how each step of the sampler should have moved; it needs many pictures (docs/log.md). `regress` is
reward-weighted regression (Peters & Schaal 2007; RWR in DDPO, arXiv 2305.13301): as r is the probability that the picture is
right, it fits p(x_0 | c, right), and what a later round found teaches the first. It is the default on this budget.

Two readings of the paper: `select` is its figure (above); `blind` is its released code, where K rounds of guided
inversion run without a look at the reward and only the last round is drawn G times and trained.

Differs from the released code: reflection keeps no graph; every iteration has its own random stream; leftover
gradients are never dropped; latents and log-probabilities stay float32; the clip is stated in nats; group-relative
advantages by default, each round crediting its own branches only; guidance 1 in rollouts by default (half the cost, and the guidance is learnt into the weights);
all rounds are trained, but for their almost noiseless steps.  The paper's choices are options: `--srrl.objective ppo --srrl.lr 3e-5
--srrl.updates 2 --srrl.mode blind --srrl.train-rounds last --srrl.advantage history --srrl.suffixes 1 5 9 --srrl.guidance 5`.

    python train.py srrl
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..diffusion.ddim import DDIMStep, ddim_step
from ..diffusion.reflection import ReflectionConfig, moments, renoise_to
from ..diffusion.sample import Trajectory, collect, denoise, last
from ..diffusion.schedule import Schedule, StepTable
from ..pipeline import LatentDiffusion
from ..rl.advantage import (
    RewardHistory,
    advantage_weights,
    group_advantage,
    history_advantage,
    reward_weights,
    select_best_worst,
    zero_variance_groups,
)
from ..rl.policy import clip_in_nats, gaussian_kl, ppo_clip, reduce_log_prob
from ..rl.rewards import Reward
from ..run import Run
from ..streams import rng
from .pretrain import level_weight


@dataclass(frozen=True)
class SRRLConfig:
    iterations: int = 70  # of rollout and update
    prompts: int = 24  # per iteration
    group: int = 2  # G, branches per prompt and round
    steps: int = 20  # denoising steps of a picture
    guidance: float = 1.0  # w of the branches, in rollout and update alike
    eta: float = 1.0  # 1 = as much step noise as DDPM; must be positive, or there is no policy
    mode: Literal["select", "blind"] = "select"  # whether the reward chooses what is re-noised
    rounds: int = 1  # K, reflections; 0 is DDPO
    curriculum: int = 0  # iterations before each further round is allowed; 0 = all rounds from the start
    train_rounds: Literal["all", "last"] = "all"  # which rounds' branches are trained on
    w_denoise: float = 3.0  # guidance of the blind rounds' drawing
    w_renoise: float = 0.1  # guidance of re-noising
    renormalise: bool = True  # bring re-noised latents back to mean 0, std 1
    fresh_noise: float = 0.0  # share l of new noise in re-noised latents, sqrt(1 - l^2) old + l new
    suffixes: tuple[int, ...] = ()  # trained suffix lengths, taken in turns; branches share what comes before
    same_noise: bool = (
        True  # branches of a group start from the same x_T (else only in rounds after the first)
    )
    objective: Literal["regress", "ppo"] = (
        "regress"  # on the pictures, noised anew; or on the sampler's steps
    )
    replay: int = 8  # regress: iterations whose pictures are learnt from
    batch: int = 64  # regress: pictures of an optimiser step
    floor: float = (
        0.5  # regress: added to the sum of a prompt's rewards, so that one that always fails counts little
    )
    anchored: int = 350  # regress: noise levels t below it, which draw the details, go on imitating the base
    late: float = 20.0  # regress: largest weight of a late noise level, see `level_weight`
    advantage: Literal["group", "history"] = (
        "group"  # ppo: GRPO, or the paper's z-score with best/worst selection
    )
    std_floor: float = (
        0.1  # added to a group's std of rewards, so that jitter in a solved group teaches nothing
    )
    history: int = 8  # ppo: stages of rewards that the z-score remembers
    lr: float = 2e-4  # of AdamW; 3e-5 for ppo
    warmup: int = 5  # iterations of linear warm-up; without it the first steps destroy the model
    cooldown: float = 0.3  # share of the iterations, the last, over which the rate falls to 0
    updates: int = 8  # optimiser steps per iteration; with ppo, each on its share of the denoising steps
    trained: float = (
        0.5  # ppo: share of the denoising steps that an iteration trains on, drawn anew each time
    )
    min_sigma: float = 0.1  # ppo: steps with less noise are not trained, their KL explodes: see `jobs`
    reduction: Literal["mean", "sum"] = "mean"  # ppo: of the log-probability over the latent's dimensions
    clip: float = 1e-2  # ppo: e, on the ratio of reduced log-probabilities; at 256 dimensions 2.6 nats
    kl: float = 0.0  # ppo: weight of the KL to the base, in reduced nats per step
    grad_norm: float = 1.0  # largest norm of an update's gradient

    def __post_init__(self) -> None:
        for name in ("iterations", "prompts", "steps", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.anchored < 1000:
            raise ValueError(f"anchored is a noise level in [0, 1000), got {self.anchored}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown is a share in [0, 1], got {self.cooldown}")
        if min(self.replay, self.batch) < 1 or self.floor <= 0:
            raise ValueError("replay and batch must be at least 1, and floor positive")
        if self.objective == "regress" and self.kl > 0:
            raise ValueError("kl belongs to --srrl.objective ppo; the regression has no such term")
        if self.group < 2:
            raise ValueError(f"group must be at least 2 to compare its members, got {self.group}")
        if self.rounds < 0:
            raise ValueError(f"rounds must be 0 or more, got {self.rounds}")
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta must lie in (0, 1], got {self.eta}: without step noise there is no policy")
        if not 0 < self.trained <= 1:
            raise ValueError(f"trained is a share in (0, 1], got {self.trained}")
        if self.min_sigma < 0:
            raise ValueError(f"min_sigma is a standard deviation, 0 or more, got {self.min_sigma}")
        if any(not 1 <= s <= self.steps for s in self.suffixes):
            raise ValueError(f"suffixes {self.suffixes} must lie between 1 and steps = {self.steps}")
        clip_in_nats(self.clip, 1)  # raises on a clip that is not positive
        self.reflection  # noqa: B018  raises on reflection options out of range

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, 1, and a linear fall to 0 at the end."""
        left = (self.iterations - step) / (self.cooldown * self.iterations) if self.cooldown else 1.0
        return min(1.0, (step + 1) / max(1, self.warmup), left)

    @property
    def reflection(self) -> ReflectionConfig:
        return ReflectionConfig(
            max(1, self.rounds), self.w_denoise, self.w_renoise, self.steps,
            renormalise=self.renormalise, fresh_noise=self.fresh_noise,
        )  # fmt: skip


class Round(NamedTuple):
    """The branches of one round.  n prompts, g branches, s steps of which the last `table` were drawn per branch."""

    x_T: Tensor  # (n c h w) the noise that the round started from
    table: StepTable  # the steps in `path`
    path: Trajectory  # latents (n*g s+1 c h w), log_probs (n*g s)
    images: Tensor  # (n*g 3 h w)
    rewards: Tensor  # (n g)


class Cost(NamedTuple):
    """What it took.  A UNet evaluation is one picture through the network once, forward."""

    unet: int = 0  # evaluations while drawing
    trained: int = 0  # evaluations while updating, with a backward pass or of the base that is imitated
    rewards: int = 0  # reward calls, one per picture

    def plus(self, unet: int = 0, trained: int = 0, rewards: int = 0) -> "Cost":
        return Cost(self.unet + unet, self.trained + trained, self.rewards + rewards)


def evaluations(w: float) -> int:
    """UNet evaluations of one sample at guidance w: 0 and 1 need one side only."""
    return 1 if w in (0, 1) else 2


@dataclass
class Rollout:
    """Everything that one iteration drew, and what it cost."""

    texts: list[str]
    context: Tensor  # (n t d) embedded prompts
    rounds: list[Round] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)


@torch.no_grad()
def rollout(
    pipe: LatentDiffusion, texts: list[str], reward: Reward, config: SRRLConfig, seed: int, step: int
) -> Rollout:
    """Draw K + 1 rounds of G branches for each prompt.  No graph is kept; all noise comes from streams of (seed, step)."""
    n, g = len(texts), config.group
    context = pipe.embed(texts)  # (n t d)
    one, many = pipe.eps(context), pipe.eps(context.repeat_interleave(g, 0))
    table = pipe.table(config.steps)
    shared = config.steps - config.suffixes[step % len(config.suffixes)] if config.suffixes else 0
    x_T = pipe.noise(n, rng(seed, "start", step))  # (n c h w)
    rounds = config.rounds if not config.curriculum else min(config.rounds, step // config.curriculum)
    out = Rollout(texts, context)
    renoising = n * len(table) * evaluations(config.w_renoise)
    if config.mode == "blind":
        for k in range(rounds):
            x_0 = last(denoise(one(config.w_denoise), x_T, table))
            x_T = renoise_to(
                one(config.w_renoise), x_0, table, config.reflection, rng(seed, "reflect", step, k)
            )
            out.cost = out.cost.plus(unet=renoising + n * len(table) * evaluations(config.w_denoise))
        rounds = 0
    for k in range(rounds + 1):
        noise = rng(seed, "branch", step, k)
        start = x_T
        if shared:  # branches part late: SRRL's backward-progressive suffixes
            start = last(denoise(one(config.guidance), x_T, table[:shared], config.eta, noise))
            out.cost = out.cost.plus(unet=n * shared * evaluations(config.guidance))
        fork = start.repeat_interleave(g, 0)  # (n*g c h w)
        if not config.same_noise and k == 0 and not shared and (config.mode == "select" or not config.rounds):
            fork = pipe.noise(n * g, rng(seed, "start", step, "all"))
        own = table[shared:]
        path = collect(fork, denoise(many(config.guidance), fork, own, config.eta, noise))
        images = pipe.decode(path.latents[:, -1])  # (n*g 3 h w)
        rewards = reward(images, [t for t in texts for _ in range(g)]).view(n, g)
        out.rounds.append(Round(x_T, own, path, images, rewards))
        out.cost = out.cost.plus(unet=n * g * len(own) * evaluations(config.guidance), rewards=n * g)
        if k < rounds:  # the reward points its thumb; what it chose becomes noise again
            best = rewards.argmax(1) + torch.arange(n, device=rewards.device) * g
            x_0 = path.latents[best.to(path.latents.device), -1]
            x_T = renoise_to(
                one(config.w_renoise), x_0, table, config.reflection, rng(seed, "reflect", step, k)
            )
            out.cost = out.cost.plus(unet=renoising)
    return out


def advantages(
    out: Rollout, config: SRRLConfig, history: RewardHistory, keys: list[str]
) -> list[tuple[Tensor, Tensor]]:
    """For each round the advantages (n g) and which branches are trained on (n g) bool."""
    result = []
    for k, round_ in enumerate(out.rounds):
        rewards = round_.rewards.cpu()
        if config.train_rounds == "last" and k + 1 < len(out.rounds):
            result.append((torch.zeros_like(rewards), torch.zeros_like(rewards, dtype=torch.bool)))
        elif config.advantage == "group":
            kept = ~zero_variance_groups(rewards)
            result.append((group_advantage(rewards, config.std_floor), kept[:, None].expand_as(rewards)))
        else:
            z = history_advantage(history, keys, rewards)
            result.append((advantage_weights(z), select_best_worst(z)))
    if config.advantage == "history":
        for round_ in out.rounds:
            history.add(keys, round_.rewards.cpu())
    return result


class UpdateStats(NamedTuple):
    """What an iteration's updates did; log-ratios in nats of the whole latent."""

    loss: float
    clip_high: float  # share of samples stopped by the upper clip
    clip_low: float  # share stopped by the lower
    log_ratio: float  # the largest seen
    first_ratio: float  # largest |rho - 1| before the first update: 0, or something is wrong
    kl: float  # nats per picture from the base, in closed form
    grad_norm: float  # mean over the updates, before clipping
    updates: int  # optimiser steps taken
    evaluations: int  # of the UNet, with a backward pass or of the base that is imitated


def score(
    pipe: LatentDiffusion, unet: torch.nn.Module, context: Tensor, round_: Round, i: int, config: SRRLConfig
) -> DDIMStep:
    """Step i of a round's branches under a UNet: its mean, and the log-probability of what the branches did.

    The batch is the rollout's, number for number, so that the policy that drew it gives the very log-probabilities
    of the rollout.
    """
    x, x_prev = (round_.path.latents[:, j].to(context.device) for j in (i, i + 1))  # (n*g c h w)
    eps = replace(pipe, unet=unet).eps(context)(config.guidance)(x, round_.table.t[i])
    table = round_.table
    return ddim_step(x, eps, table.abar[i], table.abar_prev[i], table.sigma(config.eta)[i], x_prev)


def jobs(
    out: Rollout, advantage: list[tuple[Tensor, Tensor]], config: SRRLConfig, generator: torch.Generator
) -> list[list[tuple[int, int]]]:
    """The (round, step) pairs to train on, shuffled, in one list per optimiser step.

    A step without noise (sigma 0) has no density and is left out, and so is a round without anything to learn.
    Steps with hardly any noise are left out too (`min_sigma`).  A change of eps moves a step's mean by c standard
    deviations: over ten steps |c| lies between 0.97 and 1.32, but it is 8.3 at the one before the last (sigma 0.04), whose
    gradient would drown the others' and whose KL would be 64 times theirs.
    """
    pairs = [
        (k, i)
        for k, (round_, (_, kept)) in enumerate(zip(out.rounds, advantage))
        for i, sigma in enumerate(round_.table.sigma(config.eta))
        if sigma > config.min_sigma and kept.any()
    ]
    order = torch.randperm(len(pairs), generator=generator)
    order = order[: math.ceil(config.trained * len(pairs))]
    return [[pairs[j] for j in chunk] for chunk in order.chunk(config.updates)] if len(order) else []


def update(
    pipe: LatentDiffusion,
    base: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    out: Rollout,
    advantage: list[tuple[Tensor, Tensor]],
    config: SRRLConfig,
    generator: torch.Generator,
) -> UpdateStats:
    """PPO-clip on the branches of all rounds (E8), `config.updates` optimiser steps."""
    dims = math.prod(pipe.latent_shape)
    context = out.context.repeat_interleave(config.group, 0)  # (n*g t d)
    sums = dict.fromkeys(("loss", "high", "low", "kl", "norm"), 0.0)
    log_ratio = first_ratio = 0.0
    trained = kl_count = 0
    chunks = jobs(out, advantage, config, generator)
    for number, chunk in enumerate(chunks):
        optimizer.zero_grad(set_to_none=True)
        samples = sum(int(advantage[k][1].sum()) for k, _ in chunk)  # branches x steps in this optimiser step
        for k, i in chunk:
            round_, rows = out.rounds[k], advantage[k][1].flatten().to(pipe.device)  # (n*g) bool
            now, old = (
                score(pipe, pipe.unet, context, round_, i, config),
                round_.path.log_probs[:, i].to(pipe.device),
            )
            new_reduced, old_reduced = (
                reduce_log_prob(v, dims, config.reduction)[rows] for v in (now.log_prob, old)
            )
            stats = ppo_clip(
                new_reduced, old_reduced, advantage[k][0].flatten().to(pipe.device)[rows], config.clip
            )
            share = int(rows.sum()) / samples
            loss = stats.loss * share
            if (
                config.kl > 0 or kl_count == 0
            ):  # for the log alone, one step an iteration is an unbiased sample
                with torch.no_grad():
                    reference = score(pipe, base, context, round_, i, config)
                kl = gaussian_kl(now.mean, reference.mean, now.sigma)  # (n*g) nats
                loss = loss + config.kl * share * reduce_log_prob(kl[rows], dims, config.reduction).mean()
                sums["kl"] += kl.mean().item() * len(round_.table)
                kl_count += 1
            loss.backward()
            trained += len(now.mean) * evaluations(config.guidance)
            nats = (now.log_prob.detach() - old).abs().max().item()
            log_ratio = max(log_ratio, nats)
            if number == 0:
                first_ratio = max(first_ratio, math.expm1(min(nats, 80.0)))
            for name, value in (("loss", stats.loss), ("high", stats.clip_high), ("low", stats.clip_low)):
                sums[name] += value.item() * share
        norm = torch.nn.utils.clip_grad_norm_(pipe.unet.parameters(), config.grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of update {number} is not finite; lower --srrl.lr {config.lr}"
            )
        sums["norm"] += norm.item()
        optimizer.step()
    m = max(1, len(chunks))
    return UpdateStats(
        sums["loss"] / m, sums["high"] / m, sums["low"] / m, log_ratio, first_ratio,
        sums["kl"] / max(1, kl_count), sums["norm"] / m, len(chunks), trained,
    )  # fmt: skip


class Replay(nn.Module):
    """The latest pictures: what each was drawn for, and how much it counts.  A module, so that a run saves it."""

    def __init__(self, size: int, latent_shape: tuple[int, int, int], tokens: int) -> None:
        super().__init__()
        self.register_buffer("latents", torch.zeros(size, *latent_shape))  # (m c h w)
        self.register_buffer("ids", torch.zeros(size, tokens, dtype=torch.long))  # (m t)
        self.register_buffer("weights", torch.zeros(size))  # (m) 0 = not filled yet
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # pictures ever added

    def add(self, latents: Tensor, ids: Tensor, weights: Tensor) -> None:
        """In place of the oldest.  Shapes: latents (b c h w), ids (b t), weights (b)"""
        rows = (self.count.cpu() + torch.arange(len(latents))) % len(self.weights)  # (b)
        self.latents[rows] = latents.to(self.latents)
        self.ids[rows] = ids.to(self.ids)
        self.weights[rows] = weights.to(self.weights)
        self.count += len(latents)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`n` pictures, as often as their weights say.  -> latents (n c h w), ids (n t)"""
        rows = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator)
        return self.latents[rows.to(self.latents.device)], self.ids[rows.to(self.ids.device)]


def remember(replay: Replay, pipe: LatentDiffusion, out: Rollout, config: SRRLConfig) -> None:
    """Put the pictures of the trained rounds into the replay; all rounds of a prompt share its weight."""
    rounds = out.rounds if config.train_rounds == "all" else out.rounds[-1:]
    rewards = torch.stack([r.rewards.cpu() for r in rounds], 1)  # (n k g)
    weights = reward_weights(rewards.flatten(1), config.floor).view_as(rewards)  # (n k g)
    ids = pipe.tokenizer(out.texts).repeat_interleave(config.group, 0)  # (n*g t)
    for k, round_ in enumerate(rounds):
        replay.add(round_.path.latents[:, -1], ids, weights[:, k].flatten())


def regress(
    pipe: LatentDiffusion,
    base: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    replay: Replay,
    config: SRRLConfig,
    generator: torch.Generator,
) -> UpdateStats:
    """Reward-weighted regression on the replay, `config.updates` optimiser steps of `config.batch` pictures.

    It never asks how a picture was drawn, so what reflection found in a later round teaches the first round as well. What is
    to be seen is decided at high noise; below `config.anchored` the target is the base's prediction in place of the true
    noise, or its own slips would be learnt as style, and pictures of combinations that no prompt asked for fall apart.
    """
    if not replay.weights.any():  # no picture was worth anything yet
        return UpdateStats(0, 0, 0, 0, 0, 0, 0, 0, 0)
    loss_sum = norm_sum = kl = 0.0
    for number in range(config.updates):
        x_0, ids = replay.draw(config.batch, generator)  # (b c h w), (b t)
        t = torch.randint(pipe.schedule.config.train_steps, (len(x_0),), generator=generator).to(pipe.device)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)  # (b c h w)
        x_t = pipe.schedule.add_noise(x_0, t, noise)
        with torch.no_grad():
            context = pipe.text_encoder(ids)  # (b t d)
            before = replace(pipe, unet=base).eps(context)(1.0)(x_t, t)  # (b c h w)
        eps = pipe.eps(context)(1.0)(x_t, t)
        kl += path_kl(pipe.schedule, t, (eps - before).detach()) / config.updates
        target = torch.where((t < config.anchored).view(-1, 1, 1, 1), before, noise)
        error = ((eps - target) ** 2).flatten(1).mean(1)  # (b) DDPM (14)
        loss = (level_weight(pipe.schedule, t, config.late) * error).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(pipe.unet.parameters(), config.grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of update {number} is not finite; lower --srrl.lr {config.lr}"
            )
        optimizer.step()
        loss_sum, norm_sum = loss_sum + loss.item(), norm_sum + norm.item()
    m = config.updates
    return UpdateStats(loss_sum / m, 0.0, 0.0, 0.0, 0.0, kl, norm_sum / m, m, 2 * m * config.batch)


def path_kl(schedule: Schedule, t: Tensor, change: Tensor) -> float:
    """KL between two ancestral samplers, nats per picture, estimated from the change of eps at random levels t.

    One step of DDPM with variance beta:  KL = beta / (2 alpha (1 - abar)) |change|^2  (DDPM 12); T of them make the path.
    Shapes: t (b), change (b c h w) -> ()
    """
    abar = schedule.abar.to(t.device)
    before = torch.where(t > 0, abar[(t - 1).clamp(min=0)], 1.0)
    alpha = abar[t] / before  # (b)
    step = (1 - alpha) / (2 * alpha * (1 - abar[t])) * (change**2).flatten(1).sum(1)
    return schedule.config.train_steps * step.mean().item()


def train_srrl(
    config: SRRLConfig,
    seed: int,
    pipe: LatentDiffusion,
    reward: Reward,
    draw_texts: Callable[[int], tuple[list[str], list[str]]],
    witness: Callable[[Tensor, list[str]], Tensor],
    run: Run,
) -> tuple[LatentDiffusion, Cost]:
    """The loop.  `draw_texts(step)` gives prompts and the family that each belongs to; `witness` is the exact checker,
    printed and logged beside the reward and never trained on.  -> the trained pipeline and what it took."""
    base = copy.deepcopy(pipe.unet).eval().requires_grad_(False)
    pipe.unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=config.lr, weight_decay=1e-4)
    history = RewardHistory(config.history)
    memory: dict = {"cost": [0, 0, 0], "updates": 0, "history": history.state_dict()}
    kept = (
        config.replay
        * config.prompts
        * config.group
        * (config.rounds + 1 if config.mode == "select" and config.train_rounds == "all" else 1)
    )
    replay = Replay(kept, pipe.latent_shape, pipe.tokenizer.length).to(pipe.device)
    networks = {"unet": pipe.unet, "replay": replay}
    for step in run.steps("srrl", config.iterations, networks, optimizer, memory=memory):
        history.load_state_dict(memory["history"])
        for group in optimizer.param_groups:
            group["lr"] = config.lr * config.lr_factor(step)
        texts, keys = draw_texts(step)
        out = rollout(pipe, texts, reward, config, seed, step)
        if config.objective == "regress":
            remember(replay, pipe, out, config)
            stats = regress(pipe, base, optimizer, replay, config, rng(seed, "update", step))
        else:
            advantage = advantages(out, config, history, keys)
            stats = update(pipe, base, optimizer, out, advantage, config, rng(seed, "update", step))
        cost = Cost(*memory["cost"]).plus(*out.cost).plus(trained=stats.evaluations)
        memory |= {
            "cost": [*cost],
            "updates": memory["updates"] + stats.updates,
            "history": history.state_dict(),
        }
        report(run, step, out, stats, witness, memory, config)
    pipe.unet.eval().requires_grad_(False)
    return pipe, Cost(*memory["cost"])


def report(
    run: Run,
    step: int,
    out: Rollout,
    stats: UpdateStats,
    witness: Callable[[Tensor, list[str]], Tensor],
    memory: dict,
    config: SRRLConfig,
) -> None:
    """One line a step with the numbers that reveal lies: the truth stands beside the reward."""
    rewards = torch.stack([r.rewards for r in out.rounds]).cpu()  # (k n g)
    texts = [t for t in out.texts for _ in range(config.group)]
    right = [witness(r.images.cpu(), texts).mean().item() for r in out.rounds]
    latent = [[v.mean().item() for v in moments(r.x_T)] for r in out.rounds]
    values = {
        "reward": rewards.mean().item(),
        "reward_se": (rewards.std() / rewards.numel() ** 0.5).item(),
        "right": sum(right) / len(right),
        "reward_by_round": [r.mean().item() for r in rewards],
        "right_by_round": right,
        "flat_groups": sum(int(zero_variance_groups(r).sum()) for r in rewards),
        **stats._asdict(),
        "latent_mean": [m for m, _ in latent],
        "latent_std": [s for _, s in latent],
        "updates_total": memory["updates"],
        "reward_calls": memory["cost"][2],
        "unet_evaluations": memory["cost"][0] + memory["cost"][1],
    }
    run.log("srrl", step, **values)
    run.bar.set_postfix(
        reward=f"{values['reward']:.2f}", right=f"{values['right']:.2f}", kl=f"{stats.kl:.1f}"
    )
