"""SRRL: self-reflective reinforcement learning (Pan et al. 2025, arXiv 2505.22407).

With no rounds it is DDPO. A whole denoising is one thought; between thoughts the model looks at its picture
and turns it back into noise.

    for each prompt c:  x_T^0 ~ N(0, I)
        for round k = 0 .. K:
            sample G branches x_T^k -> x_0         eta > 0: every step is an action with a density (E2, E3)
            score them; re-noise the best          guidance w_renoise below that of sampling: the
                to x_T^(k+1)                       condition-guided forward process (E4)
            ours: an accepted prompt is done, a refused one goes on from minus its noise, see below
    learn from all rounds; a prompt's pictures of all rounds are one group
        A = 2 (r - (sum of the group + 1/2) / (n + 1))      group-relative, for rewards in [0, 1]
        d = eps_theta - eps_base at (x_t, t, c), x_t = x_0 noised anew with n
        L = w(t) mean[ 2 A d (eps_base - n) + b d^2 ]                           `grpo`, see learn.py

The paper's objective is PPO on the steps of the sampler (E6 to E8, `--objective ppo`). About 99 % of a step's
noise never reaches the picture, and PPO's gradient consists of that noise; `grpo` is its average over it, and
needs fewer pictures (docs/gradients.md). `regress` learns from what the reward accepts alone.

Two readings of the paper: `select` is its figure (above); `blind` is its released code, where K rounds of
guided inversion run without a look at the reward and only the last round is sampled G times and trained.

Why minus: a re-noised picture is remembered, right or wrong. Of pictures that the base sampled right, 0.87
are right again when sampled from their noise, and of wrong ones 0.18 are; from new noise 0.56 and 0.44. The
opposite noise is as likely under N(0, I), and avoids the picture: 0.62 of the wrong ones are right from there
(512 held-out pictures, `python scripts/measure.py memory`). So the rewards of a prompt's rounds differ, and
their difference is what a group-relative advantage learns from. `--wrong repeat` re-noises wrong pictures as
if they were right, `fresh` takes new noise.

Why accepted prompts are done: sampling them again teaches little and costs as much. Spent on other prompts,
the same reward calls teach more, and fewer prompts are memorised (docs/log.md). `--redraw all` gives every
prompt all rounds.

Differs from the released code: reflection keeps no graph; every iteration has its own random stream; leftover
gradients are never dropped; latents and log-probabilities stay float32; the clip is stated in nats;
advantages compare the rounds of a prompt; guidance 1 in rollouts by default (half the cost, and the guidance
is learnt into the weights); re-noising without guidance, in 5 steps, to the scale of the prior and with a
quarter of its variance new; all rounds are trained.  `--method paper` has the paper's choices.

    minireflect train srrl
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..diffusion.reflection import moments
from ..pipeline import LatentDiffusion, Reward
from ..ranges import Count
from ..rl.advantage import RewardHistory, zero_variance_groups
from ..rl.collapse import StopRule, statistics, watch
from ..run import Job
from ..streams import rng
from .learn import LearnConfig, Learner, UpdateStats, learn
from .rollout import Cost, Rollout, RolloutConfig, Round, rollout


@dataclass(frozen=True)
class SRRLConfig(RolloutConfig, LearnConfig, StopRule):
    """The samples of an iteration (`RolloutConfig`), and how they are learnt from (`LearnConfig`)."""

    # of rollout and update
    iterations: Count = 60

    def __post_init__(self) -> None:
        super().__post_init__()
        pictures = self.group * (self.rounds + 1 if self.mode == "select" else 1)
        if self.advantage == "group" and self.objective != "regress" and pictures < 2:
            raise ValueError("the advantage group compares pictures of a prompt; it has one: try --group 4")


FRESH = {"rounds": 0, "group": 4}  # no reflection
# DDPO (arXiv 2305.13301): PPO on the sampler's steps; a reward is compared with past rewards of its prompt.
# That only the best and the worst of a group are kept is B2-DiffuRL's and SRRL's (E7).
DDPO = FRESH | {"objective": "ppo", "advantage": "history", "updates": 2, "pull": 0.0, "steps": 20}
# GRPO (arXiv 2402.03300) on noised pictures, as DiffusionNFT and AWM have it; a reward is compared with its
# group
GRPO = FRESH | {"advantage": "group"}
TOY = {"prompts_per_iteration": 21}  # about as many reward calls as srrl
LARGE = {"iterations": 100, "prompts_per_iteration": 8, "guidance": 5.0, "lr": 1e-4, "steps": 20}
# std_floor: CLIP's cosines of one prompt have a standard deviation of 0.02
CHECKPOINT = LARGE | {"updates": 4, "batch": 32, "std_floor": 1e-3}
# SRRL as released (arXiv 2505.22407): DDPO with blind reflection at the guidance gap
BLIND = {"mode": "blind", "rounds": 1, "w_renoise": 0.1, "renoise_steps": 20, "renormalise": False}
PAPER = DDPO | BLIND | {"fresh_noise": 0.0, "group": 5, "suffixes": (1, 5, 9), "guidance": 5.0}
# every prompt is sampled again from the negative of its noise: no level of such a reward means right
PAIRS = {"advantage": "group", "rounds": 1, "redraw": "all", "group": 2}

# method: options on the toy, options on a real checkpoint.  The clip of DDPO is on the mean log-probability:
# 1e-4 is 1.6 nats at 4 x 64 x 64 dimensions.
RECIPES = {
    "srrl": ({}, CHECKPOINT | PAIRS),
    "paper": (PAPER | {"lr": 3e-5, "prompts_per_iteration": 8}, CHECKPOINT | PAPER | {"clip_range": 1e-4}),
    "ddpo": (DDPO | TOY | {"lr": 3e-5}, CHECKPOINT | DDPO | {"clip_range": 1e-4}),
    "grpo": (GRPO | TOY, CHECKPOINT | GRPO),
}


def recipe(name: str, checkpoint: bool = False) -> SRRLConfig:
    """The options of a method, for the toy or a real checkpoint.

    Raises ValueError on another name.
    """
    if name not in RECIPES:
        raise ValueError(f"method {name!r} is not one of {', '.join(RECIPES)}")
    return SRRLConfig(**RECIPES[name][checkpoint])


Draw = Callable[[int], tuple[list[str], list[str]]]  # iteration -> its prompts, and the family of each


def train_srrl(
    config: SRRLConfig, pipe: LatentDiffusion, reward: Reward, draw: Draw, witness: Reward | None, job: Job
) -> tuple[LatentDiffusion, Cost]:
    """The loop.

    `witness` is the inspector, where there is one: logged beside the reward and never trained on.  A UNet
    with LoRA learns in its adapters alone.  -> the trained pipeline and what it took
    """
    run, seed = job.run, job.seed
    history = RewardHistory()
    rounds = config.rounds + 1 if config.mode == "select" else 1
    pictures = config.prompts_per_iteration * config.group * rounds
    learner = Learner.of(pipe, config, config.sampler, pictures)
    learner.history = history if config.advantage == "history" else None
    memory: dict = {"cost": [0, 0, 0], "updates": 0, "history": history.state_dict(), "watch": {}}
    for step in run.steps("srrl", config.iterations, learner.networks, learner.optimizer, memory=memory):
        history.load_state_dict(memory["history"])
        job.watch(step)
        texts, families = draw(step)
        out = replace(rollout(pipe, texts, reward, config, seed, step), families=families)
        stats = learn(learner, out, config.lr_factor(step, config.iterations), rng(seed, "update", step))
        cost = Cost(*memory["cost"]).plus(out.cost).plus(Cost(trained=stats.evaluations))
        updates = memory["updates"] + stats.updates
        first = out.rounds[0]
        seen = statistics(first.path.latents[:, -1], first.images, witness is not None)
        seen |= {"clip_high": stats.clip_high, "clip_low": stats.clip_low}
        if config.group > 1:
            seen["flat"] = zero_variance_groups(first.rewards.cpu()).float().mean().item()
        said = watch(config, run, memory["watch"], seen)
        memory |= {"cost": [*cost], "updates": updates, "history": history.state_dict()}
        values = report(out, stats, witness, config.accept)
        spent = {"reward_calls": cost.rewards, "unet_evaluations": cost.unet + cost.trained}
        run.log("srrl", step, **values, updates_total=updates, **spent, x0_size=seen["size"], collapse=said)
        run.show("srrl", step, out.rounds[0].images)
        shown = {"reward": values["reward_by_round"], "right": values["right_by_round"]}
        run.bar.set_postfix(**{k: f"{v[0]:.2f}" for k, v in shown.items() if v}, kl=f"{stats.kl:.1f}")
    pipe.unet.eval().requires_grad_(False)
    job.watch(config.iterations)
    return pipe, Cost(*memory["cost"])


def report(out: Rollout, stats: UpdateStats, witness: Reward | None, accept: float) -> dict:
    """The log line of a step, with the inspector's verdict beside every reward."""
    by_round = [r.rewards for r in out.rounds]  # (n g) each
    rewards = torch.cat([r.flatten() for r in by_round])
    verdicts = [witness(r.images.cpu(), out.texts_of(r)) for r in out.rounds] if witness else []
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
    """Of the prompts whose best picture was refused, the share that has an accepted one a round later.

    None if none was refused.
    """
    refused = before.rows[before.rewards.amax(1) < accept].tolist()
    again = dict(zip(after.rows.tolist(), (after.rewards.amax(1) >= accept).tolist()))
    return sum(again[i] for i in refused) / len(refused) if refused else None
