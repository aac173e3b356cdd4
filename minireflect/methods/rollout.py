"""What SRRL draws in one iteration: up to K + 1 rounds of G branches for each prompt, and what it costs; all options of that.

The head of srrl.py tells the method.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..diffusion.reflection import ACCEPT, OPPOSITE, ReflectionConfig, renoise_to
from ..diffusion.sample import Trajectory, collect, denoise, evaluations, last
from ..diffusion.schedule import StepTable
from ..pipeline import LatentDiffusion
from ..rl.policy import clip_in_nats
from ..rl.rewards import Reward
from ..streams import rng


@dataclass(frozen=True)
class UpdateConfig:
    """How SRRL, and RL-RIG's editor, learn from the pictures of an iteration."""

    # on the pictures, noised anew; or on the sampler's steps
    objective: Literal["regress", "ppo"] = "regress"
    replay: int = 8  # regress: iterations whose pictures are learnt from
    batch: int = 64  # regress: pictures of an optimiser step
    # regress: added to the sum of a prompt's rewards, so that one that always fails counts little
    floor: float = 0.5
    anchored: int = 150  # regress: noise levels t below it, which draw the details, go on imitating the base
    late: float = 20.0  # regress: largest weight of a late noise level, see `level_weight`
    # ppo: added to a group's std of rewards, so that jitter in a solved group teaches nothing
    std_floor: float = 0.1
    lr: float = 2e-4  # of AdamW; 3e-5 for ppo
    warmup: int = 5  # iterations of linear warm-up; without it the first steps destroy the model
    cooldown: float = 0.3  # share of the iterations, the last, over which the rate falls to 0
    updates: int = 8  # optimiser steps per iteration; with ppo, each on its share of the denoising steps
    # ppo: share of the denoising steps that an iteration trains on, drawn anew each time
    trained: float = 0.5
    min_sigma: float = 0.1  # ppo: steps with less noise are not trained, their KL explodes: see `jobs`
    reduction: Literal["mean", "sum"] = "mean"  # ppo: of the log-probability over the latent's dimensions
    clip: float = 1e-2  # ppo: e, on the ratio of reduced log-probabilities; at 256 dimensions 2.6 nats
    kl: float = 0.0  # ppo: weight of the KL to the base, in reduced nats per step
    grad_norm: float = 1.0  # largest norm of an update's gradient

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"updates must be at least 1, got {self.updates}")
        if not 0 <= self.anchored < 1000:
            raise ValueError(f"anchored is a noise level in [0, 1000), got {self.anchored}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown is a share in [0, 1], got {self.cooldown}")
        if min(self.replay, self.batch) < 1 or self.floor <= 0:
            raise ValueError("replay and batch must be at least 1, and floor positive")
        if self.objective == "regress" and self.kl > 0:
            raise ValueError("kl belongs to the objective ppo; the regression has no such term")
        if not 0 < self.trained <= 1:
            raise ValueError(f"trained is a share in (0, 1], got {self.trained}")
        if self.min_sigma < 0:
            raise ValueError(f"min_sigma is a standard deviation, 0 or more, got {self.min_sigma}")
        clip_in_nats(self.clip, 1)  # raises on a clip that is not positive

    def lr_factor(self, step: int, iterations: int) -> float:
        """Linear warm-up, 1, and a linear fall to 0 at the end."""
        left = (iterations - step) / (self.cooldown * iterations) if self.cooldown else 1.0
        return min(1.0, (step + 1) / max(1, self.warmup), left)


@dataclass(frozen=True)
class SRRLConfig(UpdateConfig):
    """What an iteration draws; how it is learnt from stands in `UpdateConfig`."""

    iterations: int = 60  # of rollout and update
    prompts: int = 64  # per iteration
    group: int = 1  # G, branches per prompt and round
    steps: int = 20  # denoising steps of a picture
    guidance: float = 1.0  # w of the branches, in rollout and update alike
    eta: float = 1.0  # 1 = as much step noise as DDPM; must be positive, or there is no policy
    mode: Literal["select", "blind"] = "select"  # whether the reward chooses what is re-noised
    rounds: int = 3  # K, reflections at most; 0 is DDPO
    curriculum: int = 0  # iterations before each further round is allowed; 0 = all rounds from the start
    train_rounds: Literal["all", "last"] = "all"  # which rounds' branches are trained on
    # select: what is drawn again in place of a picture judged wrong: minus its noise, new noise, its noise
    wrong: Literal["opposite", "fresh", "repeat"] = "opposite"
    redraw: Literal["refused", "all"] = "refused"  # select: which prompts another round is spent on
    accept: float = ACCEPT  # select: reward from which a picture counts as right
    w_denoise: float = 3.0  # guidance of the blind rounds' drawing
    w_renoise: float = OPPOSITE.w_renoise  # guidance of re-noising
    renoise_steps: int = OPPOSITE.steps  # steps of re-noising
    renormalise: bool = True  # bring re-noised latents back to mean 0, std 1
    fresh_noise: float = (
        OPPOSITE.fresh_noise
    )  # share l of new noise in re-noised latents, sqrt(1 - l^2) old + l new
    suffixes: tuple[int, ...] = ()  # trained suffix lengths, taken in turns; branches share what comes before
    # branches of a group start from the same x_T (else only in rounds after the first)
    same_noise: bool = True
    # ppo: GRPO, or the paper's z-score with best/worst selection
    advantage: Literal["group", "history"] = "group"
    history: int = 8  # ppo: stages of rewards that the z-score remembers

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iterations", "prompts", "steps", "renoise_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.group < (2 if self.objective == "ppo" else 1):
            raise ValueError(
                f"group is {self.group}; {self.objective} needs at least {1 if self.objective == 'regress' else '2, to compare its members'}: "
                f"try --srrl.group 4"
            )
        if self.rounds < 0:
            raise ValueError(f"rounds must be 0 or more, got {self.rounds}")
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta must lie in (0, 1], got {self.eta}: without step noise there is no policy")
        if any(not 1 <= s <= self.steps for s in self.suffixes):
            raise ValueError(f"suffixes {self.suffixes} must lie between 1 and steps = {self.steps}")
        self.reflection  # noqa: B018  raises on reflection options out of range

    @property
    def reflection(self) -> ReflectionConfig:
        return ReflectionConfig(
            max(1, self.rounds), self.w_denoise, self.w_renoise, self.steps,
            renormalise=self.renormalise, fresh_noise=self.fresh_noise,
        )  # fmt: skip


class Round(NamedTuple):
    """The branches of one round.  n prompts, g branches, s steps of which the last `table` were drawn per branch."""

    rows: Tensor  # (n) which prompts of the rollout it was spent on
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


@dataclass
class Rollout:
    """Everything that one iteration drew, and what it cost."""

    texts: list[str]
    context: Tensor  # (n t d) embedded prompts
    rounds: list[Round] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    def texts_of(self, round_: Round) -> list[str]:
        """The prompt of every branch of a round."""
        per_prompt = round_.rewards.shape[1]
        return [self.texts[i] for i in round_.rows.tolist() for _ in range(per_prompt)]

    def context_of(self, round_: Round) -> Tensor:
        """The embedded prompt of every branch of a round.  -> (n*g t d)"""
        return self.context[round_.rows].repeat_interleave(round_.rewards.shape[1], 0)


@torch.no_grad()
def rollout(
    pipe: LatentDiffusion, texts: list[str], reward: Reward, config: SRRLConfig, seed: int, step: int
) -> Rollout:
    """Draw up to K + 1 rounds of G branches for each prompt.  No graph is kept; all noise comes from streams of (seed, step)."""
    out = Rollout(texts, pipe.embed(texts))
    rows = torch.arange(len(texts), device=out.context.device)  # (n) the prompts of a round
    x_T = pipe.noise(len(texts), rng(seed, "start", step))  # (n c h w)
    rounds = config.rounds if not config.curriculum else min(config.rounds, step // config.curriculum)
    if config.mode == "blind":
        for k in range(rounds):
            x_T = reflect_blindly(pipe, out, x_T, config, rng(seed, "reflect", step, k))
        rounds = 0
    for k in range(rounds + 1):
        x_T_of_branches = None  # as their prompt's
        if not (config.same_noise or config.suffixes or k or (config.mode == "blind" and config.rounds)):
            x_T_of_branches = pipe.noise(len(texts) * config.group, rng(seed, "start", step, "all"))
        round_ = draw_round(
            pipe, out, rows, x_T, x_T_of_branches, reward, config, step, rng(seed, "branch", step, k)
        )
        out.rounds.append(round_)
        if k == rounds:
            break
        rows, x_T = reflect_on(pipe, out, round_, config, rng(seed, "reflect", step, k))
        if not len(rows):
            break
    return out


def draw_round(
    pipe: LatentDiffusion,
    out: Rollout,
    rows: Tensor,
    x_T: Tensor,
    x_T_of_branches: Tensor | None,
    reward: Reward,
    config: SRRLConfig,
    step: int,
    noise: torch.Generator,
) -> Round:
    """G branches of every prompt in `rows`, scored.  Shapes: rows (n), x_T (n c h w), x_T_of_branches (n*g c h w)"""
    n, g, table = len(rows), config.group, pipe.table(config.steps)
    shared = config.steps - config.suffixes[step % len(config.suffixes)] if config.suffixes else 0
    start = x_T
    if shared:  # branches part late: SRRL's backward-progressive suffixes
        eps = pipe.eps(out.context[rows])(config.guidance)
        start = last(denoise(eps, x_T, table[:shared], config.eta, noise))
        out.cost = out.cost.plus(unet=n * shared * evaluations(config.guidance))
    fork = start.repeat_interleave(g, 0) if x_T_of_branches is None else x_T_of_branches  # (n*g c h w)
    eps = pipe.eps(out.context[rows].repeat_interleave(g, 0))(config.guidance)
    path = collect(fork, denoise(eps, fork, table[shared:], config.eta, noise))
    images = pipe.decode(path.latents[:, -1])  # (n*g 3 h w)
    rewards = reward(images, [out.texts[i] for i in rows.tolist() for _ in range(g)]).view(n, g)
    out.cost = out.cost.plus(
        unet=n * g * (config.steps - shared) * evaluations(config.guidance), rewards=n * g
    )
    return Round(rows, x_T, table[shared:], path, images, rewards)


def reflect_on(
    pipe: LatentDiffusion, out: Rollout, round_: Round, config: SRRLConfig, noise: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The reward points its thumb: which prompts get another round, and from which noise.  -> rows (m), x_T (m c h w)"""
    n, g = round_.rewards.shape
    value, best = (v.to(round_.rows.device) for v in round_.rewards.max(1))  # (n)
    x_0 = round_.path.latents[best + torch.arange(n, device=best.device) * g, -1]  # (n c h w)
    rows, wrong = round_.rows, value < config.accept  # (n), (n) bool
    if config.redraw == "refused":  # what was accepted is done
        rows, x_0, wrong = rows[wrong], x_0[wrong], wrong[wrong]
    if not len(rows):
        return rows, x_0
    sign = torch.where(wrong, -1.0, 1.0) if config.wrong == "opposite" else None
    eps, back = pipe.eps(out.context[rows])(config.w_renoise), pipe.table(config.renoise_steps)
    x_T = renoise_to(eps, x_0, back, config.reflection, noise, sign)
    if config.wrong == "fresh":
        x_T = torch.where(wrong.view(-1, 1, 1, 1), pipe.noise(len(rows), noise), x_T)
    out.cost = out.cost.plus(unet=len(rows) * len(back) * evaluations(config.w_renoise))
    return rows, x_T


def reflect_blindly(
    pipe: LatentDiffusion, out: Rollout, x_T: Tensor, config: SRRLConfig, noise: torch.Generator
) -> Tensor:
    """SRRL's released code: draw with guidance, re-noise with less, whatever was drawn.  Shapes: x_T (n c h w) -> (n c h w)"""
    table, back = pipe.table(config.steps), pipe.table(config.renoise_steps)
    make_eps = pipe.eps(out.context)
    x_0 = last(denoise(make_eps(config.w_denoise), x_T, table))
    each = len(table) * evaluations(config.w_denoise) + len(back) * evaluations(config.w_renoise)
    out.cost = out.cost.plus(unet=len(x_T) * each)
    return renoise_to(make_eps(config.w_renoise), x_0, back, config.reflection, noise)


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
