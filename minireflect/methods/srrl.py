"""SRRL: self-reflective reinforcement learning (Pan et al. 2025, arXiv 2505.22407).

    for each prompt c:  x_T^0 ~ N(0, I)
        for round k = 0 .. K:
            sample G branches x_T^k -> x_0         eta > 0: every step is an action with a density (E2, E3)
            score them; re-noise the best          guidance w_renoise is lower than in sampling:
                to x_T^(k+1)                       the condition-guided forward process (E4)
            here: stop if the best is accepted; otherwise continue from the negative of its noise
    learn from all rounds; the pictures of all rounds of a prompt are one group
        A = 2 (r - (sum of the group + 1/2) / (n + 1))      group-relative, for rewards in [0, 1]
        d = eps_theta - eps_base at (x_t, t, c), x_t = x_0 with new noise n
        L = w(t) mean[ 2 A d (eps_base - n) + b d^2 ]                           `grpo`, see learn.py

Without reflection (K = 0), and with PPO as the objective, this is DDPO.

Objective.  The paper uses PPO on the steps of the sampler (E6 to E8, `--objective ppo`).  About 99 % of a
step's noise never reaches the picture, but this noise dominates PPO's gradient.  `grpo` is the average of the
gradient over this noise, and needs fewer pictures (docs/gradients.md).  `regress` is weighted regression on
the pictures with high rewards.

Mode.  `--mode select`, above, follows the paper's figure.  `--mode blind` follows its released code: K rounds
of guided inversion do not use the reward, and only the last round is sampled G times and trained.

The negative of the noise.  Sampling from the noise of a picture gives a similar picture, right or wrong.  If
the base samples a right picture, its second attempt is right with probability 0.87 from the picture's noise,
and 0.56 from new noise.  If the picture is wrong, the probabilities are 0.18 and 0.44, but 0.62 from the
negative of its noise, which is as likely under N(0, I) (512 held-out pictures, `python scripts/measure.py
memory`).  The rewards of the rounds therefore differ, and a group-relative advantage learns from this
difference.  `--wrong repeat` keeps the noise of wrong pictures, and `--wrong fresh` takes new noise.

Accepted prompts are not sampled again, because this costs as much and teaches little.  The same reward calls
teach more if they are spent on other prompts, and fewer prompts are memorised (docs/log.md).  `--redraw all`
samples every prompt in all rounds.

Differs from the released code:
- no autograd graph is kept in reflection; latents and log-probabilities are float32
- every iteration has its own random stream; no accumulated gradient is dropped
- advantages compare the rounds of a prompt; all rounds are trained
- guidance is 1 in rollouts by default, at half the cost; the model learns to do without guidance
- re-noising takes 5 steps without the prompt, brings the noise to the scale of the prior, and replaces a
  quarter of its variance by new noise
`--method paper` has the choices of the released code.

    minireflect train srrl
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..diffusion.reflection import moments
from ..pipeline import LatentDiffusion, Reward
from ..ranges import Count, expect
from ..rl.advantage import RewardHistory, zero_variance_groups
from ..rl.collapse import StopRule, statistics, watch
from ..run import Job
from ..streams import rng
from .learn import MIN_SIGMA, LearnConfig, Learner, UpdateStats, learn
from .rollout import Cost, Rollout, RolloutConfig, Round, rollout


@dataclass(frozen=True)
class SRRLConfig(RolloutConfig, LearnConfig, StopRule):
    """How an iteration samples (`RolloutConfig`), and how it learns from the samples (`LearnConfig`)."""

    # iterations, each a rollout and an update
    iterations: Count = 60

    def require(self) -> None:
        pictures = self.group * (self.rounds + 1 if self.mode == "select" else 1)
        if self.advantage == "group" and self.objective != "regress" and pictures < 2:
            raise ValueError("advantage group needs two pictures of a prompt or more, got one; try --group 4")


FRESH = {"rounds": 0, "group": 4}  # no reflection
# DDPO (arXiv 2305.13301): PPO on the sampler's steps, with rewards compared with past rewards of the prompt.
# Keeping only the best and the worst of a group is from B2-DiffuRL and SRRL (E7).
DDPO = FRESH | {"objective": "ppo", "advantage": "history", "updates": 2, "pull": 0.0, "steps": 20}
# GRPO (arXiv 2402.03300) on noised pictures, as in DiffusionNFT and AWM
GRPO = FRESH | {"advantage": "group"}
TOY = {"prompts_per_iteration": 21}  # gives about as many reward calls as "srrl"
LARGE = {"iterations": 100, "prompts_per_iteration": 8, "guidance": 5.0, "lr": 1e-4, "steps": 20}
# std_floor: CLIP's cosines of one prompt have a standard deviation of 0.02
CHECKPOINT = LARGE | {"updates": 4, "batch": 32, "std_floor": 1e-3}
# SRRL as released (arXiv 2505.22407): DDPO with blind reflection
BLIND = {"mode": "blind", "rounds": 1, "w_renoise": 0.1, "renoise_steps": 20, "renormalise": False}
PAPER = DDPO | BLIND | {"fresh_noise": 0.0, "group": 5, "suffixes": (1, 5, 9), "guidance": 5.0}

# Options of each method for the synthetic world, and for a real checkpoint.  DDPO's clip applies to the mean
# log-probability: 1e-4 allows 1.6 nats at 4 x 64 x 64 dimensions.
RECIPES = {
    # rewards of real pictures have no value that means "accepted", so every prompt has two rounds
    "srrl": ({}, CHECKPOINT | {"advantage": "group", "rounds": 1, "redraw": "all", "group": 2}),
    "paper": (PAPER | {"lr": 3e-5, "prompts_per_iteration": 8}, CHECKPOINT | PAPER | {"clip_range": 1e-4}),
    "ddpo": (DDPO | TOY | {"lr": 3e-5}, CHECKPOINT | DDPO | {"clip_range": 1e-4}),
    "grpo": (GRPO | TOY, CHECKPOINT | GRPO),
}


def recipe(name: str, checkpoint: bool = False) -> SRRLConfig:
    """The options of a method, for the synthetic world or a real checkpoint.

    Raises ValueError if there is no such method.
    """
    if name not in RECIPES:
        raise ValueError(f"method {name!r} is not one of {', '.join(RECIPES)}")
    return SRRLConfig(**RECIPES[name][checkpoint])


Draw = Callable[[int], tuple[list[str], list[str]]]  # iteration -> prompts, and the family of each


def train_srrl(
    config: SRRLConfig, pipe: LatentDiffusion, reward: Reward, draw: Draw, inspector: Reward | None, job: Job
) -> tuple[LatentDiffusion, Cost]:
    """The training loop.  If the UNet has LoRA adapters, only these are trained.

    inspector: `inspector_reward`, or None for real pictures.  It is logged, and never used for training.
    -> the trained pipeline, and the cost of the training
    """
    for kind, value in {SRRLConfig: config, LatentDiffusion: pipe, Callable: reward, Job: job}.items():
        expect(value, kind, f"the {kind.__name__} of train_srrl")
    run, seed = job.run, job.seed
    if config.objective == "ppo" and not (config.sigmas(pipe.table(config.steps)) > MIN_SIGMA).any():
        raise ValueError(f"with steps {config.steps} no step draws enough noise for ppo: give more steps")
    rounds = config.rounds + 1 if config.mode == "select" else 1
    learner = Learner(pipe, config, config.guidance, config.prompts_per_iteration * config.group * rounds)
    memory: dict = {"cost": [0, 0, 0], "updates": 0, "history": {}, "watch": {}}
    for step in run.steps("srrl", config.iterations, learner.networks, learner.optimizer, memory=memory):
        learner.history = RewardHistory(**memory["history"])
        job.watch(step)
        texts, families = expect(draw(step), tuple[list[str], list[str]], "what draw(step) returns")
        if not 0 < len(texts) == len(families):
            raise ValueError(f"draw({step}) must give prompts and as many families; got {len(texts)} prompts")
        out = replace(rollout(pipe, texts, reward, config, seed, step), families=families)
        stats = learn(learner, out, config.lr_factor(step, config.iterations), rng(seed, "update", step))
        cost = Cost(*memory["cost"]).plus(out.cost).plus(Cost(trained=stats.evaluations))
        updates = memory["updates"] + stats.updates
        first = out.rounds[0]
        seen = statistics(first.path.latents[:, -1], first.images, inspector is not None)
        seen |= {"clip_high": stats.clip_high, "clip_low": stats.clip_low}
        if config.group > 1:
            seen["flat"] = zero_variance_groups(first.rewards.cpu()).float().mean().item()
        said = watch(config, run, memory["watch"], seen)
        memory |= {"cost": [*cost], "updates": updates, "history": vars(learner.history)}
        values = report(out, stats, inspector, config.accept)
        spent = {"reward_calls": cost.rewards, "unet_evaluations": cost.unet + cost.trained}
        run.log("srrl", step, **values, updates_total=updates, **spent, x0_size=seen["size"], collapse=said)
        run.show("srrl", step, first.images)
        shown = {"reward": values["reward_by_round"], "right": values["right_by_round"]}
        run.bar.set_postfix(**{k: f"{v[0]:.2f}" for k, v in shown.items() if v}, kl=f"{stats.kl:.1f}")
    pipe.unet.eval().requires_grad_(False)
    job.watch(config.iterations)
    return pipe, Cost(*memory["cost"])


def report(out: Rollout, stats: UpdateStats, inspector: Reward | None, accept: float) -> dict:
    """The values that an iteration logs."""
    by_round = [r.rewards for r in out.rounds]  # (n g) each
    rewards = torch.cat([r.flatten() for r in by_round])
    verdicts = [inspector(r.images.cpu(), out.texts_of(r)) for r in out.rounds] if inspector else []
    scales = torch.stack([v.mean() for r in out.rounds for v in moments(r.x_T)])
    means, stds = scales.view(-1, 2).T.tolist()
    return {
        "reward": rewards.mean().item(),
        "reward_se": (rewards.std() / rewards.numel() ** 0.5).item() if len(rewards) > 1 else None,
        "right": torch.cat(verdicts).mean().item() if verdicts else None,
        "reward_by_round": [r.mean().item() for r in by_round],
        "right_by_round": [v.mean().item() for v in verdicts],
        "pictures_by_round": [r.numel() for r in by_round],
        "mended": [mended(a, b, accept) for a, b in zip(out.rounds, out.rounds[1:])],
        "flat_groups": sum(int(zero_variance_groups(r).sum()) for r in by_round),
        **stats._asdict(),
        "latent_mean": means,
        "latent_std": stds,
    }


def mended(before: Round, after: Round, accept: float) -> float | None:
    """The share of refused prompts that have an accepted picture in the next round; None if none was refused.

    A prompt is refused if the reward of its best picture is below `accept`.
    """
    refused = before.rows[before.rewards.amax(1) < accept].tolist()
    again = dict(zip(after.rows.tolist(), (after.rewards.amax(1) >= accept).tolist()))
    return sum(again[i] for i in refused) / len(refused) if refused else None
