"""From rewards to advantages: compare a sample with the other samples of its group, or with past samples.

Papers: GRPO (Shao et al. 2024, arXiv 2402.03300).  The history, with the selection of the best and the worst,
is from B2-DiffuRL (Hu et al. 2025, arXiv 2503.11240), as used by SRRL (arXiv 2505.22407), E6 to E8.

    group    A = (R - mean of the group) / (std of the group + eps)                                  GRPO
    shrunk   A = 2 (R - (sum of the group + 1/2) / (n + 1))      not from a paper, for rewards in [0, 1]
    history  z = (R - mean_H) / (std_H + eps)   H: rewards of the prompt in this and the last 8 stages   (E6)
             keep the best of a group if z >= 0.5, and the worst if z < -0.5                             (E7)
             A = clip(z, -5, 5) * (beta_pos if z > 0 else beta_neg)                                      (E8)

Differs from the released SRRL:
- eps is 1e-4; with 1e-8, rewards that differ by 1e-7 have advantages of up to 1.4
- the history keeps a bounded number of prompts
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ranges import finite

EPS = 1e-4  # added to the std of rewards
PRIOR = 0.5  # expected reward of an unknown prompt, for rewards that are probabilities

Rewards = dict[str, list[list[float]]]  # key -> [stage, reward] pairs, oldest first


def finite_or_nan(rewards: Tensor) -> Tensor:
    """The rewards, which are NaN where there is none.  Raises FloatingPointError if one is infinite."""
    finite(rewards.nan_to_num(0.0, torch.inf, -torch.inf), "a reward")
    return rewards


def zero_variance_groups(rewards: Tensor) -> Tensor:
    """Whether all members of a group have the same reward, so that their z-scores are 0.

    Shapes: rewards (n g), NaN where a group has fewer members -> (n) bool
    """
    none = rewards.isnan()
    return rewards.masked_fill(none, -torch.inf).amax(1) == rewards.masked_fill(none, torch.inf).amin(1)


def group_advantage(rewards: Tensor, eps: float = EPS) -> Tensor:
    """The z-score of each reward within its group; exactly 0 in a group without variance.

    It is computed in float64.  The std is unbiased (n - 1), as in TRL and verl.
    Raises ValueError for groups of one.
    Shapes: rewards (n g), NaN where a group has fewer members -> (n g) float32
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 members, got rewards of shape {tuple(rewards.shape)}")
    R = finite_or_nan(rewards).double()
    off = R - R.nanmean(1, keepdim=True)
    others = (~R.isnan()).sum(1, keepdim=True) - 1
    std = ((off**2).nansum(1, keepdim=True) / others.clamp(min=1)).sqrt()
    return (off / (std + eps)).masked_fill(zero_variance_groups(R)[:, None], 0.0).float()


def shrunk_advantage(rewards: Tensor) -> Tensor:
    """Twice the difference from the group's mean, for rewards that are probabilities of success.

    The mean includes one extra sample of reward 1/2.  A group with a single member, or with equal rewards,
    therefore has advantages other than 0: a single reward R has A = R - 1/2.
    Shapes: rewards (n g), NaN where a group has fewer members -> (n g) in (-2, 2)
    """
    R = finite_or_nan(rewards).float()
    n = (~R.isnan()).sum(1, keepdim=True)
    return 2 * (R - (R.nansum(1, keepdim=True) + PRIOR) / (n + 1))


def reward_weights(rewards: Tensor, floor: float) -> Tensor:
    """Weights of reward-weighted regression (Peters & Schaal 2007), for rewards that are probabilities.

        w = r / (sum of r over the group + floor)

    The weighted samples follow the model's distribution, conditioned on success.  `floor` keeps the weights
    small if the whole group failed.  Raises ValueError if a reward is negative.
    Shapes: rewards (n g), NaN where a group has fewer members -> (n g)
    """
    if (rewards < 0).any():
        raise ValueError(f"rewards as weights must not be negative, got {rewards.min().item():.3g}")
    return finite_or_nan(rewards).float() / (rewards.float().nansum(1, keepdim=True) + floor)


@dataclass
class RewardHistory:
    """The rewards of each key (a prompt, or a family of prompts) in the last `stages` stages.

    Each call of `add` is a stage.  At most `max_keys` keys are kept, those that were seen last.  A run saves
    the fields as JSON.
    """

    stages: int = 8
    max_keys: int = 4096
    stage: int = 0  # stages seen so far
    rewards: Rewards = field(default_factory=dict)  # the key that was seen last is at the end

    def past(self, key: str) -> list[float]:
        """The rewards of the key, oldest first."""
        return [reward for _, reward in self.rewards.get(key, ())]

    def add(self, keys: Sequence[str], rewards: Tensor) -> None:
        """Add the rewards of a stage, and remove those that are too old.

        Shapes: rewards (n) or (n g), one key per row
        """
        known = dict(self.rewards)
        for key, row in by_key(keys, rewards).items():  # moves the key to the end
            known[key] = known.pop(key, []) + [[self.stage, r] for r in row]
        self.stage += 1
        oldest = self.stage - self.stages
        recent = {k: [e for e in entries if e[0] >= oldest] for k, entries in known.items()}
        self.rewards = dict([(k, entries) for k, entries in recent.items() if entries][-self.max_keys :])


def by_key(keys: Sequence[str], rewards: Tensor) -> dict[str, list[float]]:
    """The rewards of each key, which may have several rows.  Shapes: rewards (n) or (n g), one key per row

    Raises ValueError if the number of keys differs, and FloatingPointError if a reward is not finite.
    """
    if len(keys) != len(rewards):
        raise ValueError(f"{len(keys)} keys for {len(rewards)} rows of rewards")
    rows: dict[str, list[float]] = {}
    for key, row in zip(keys, finite(rewards, "a reward").double()[..., None].flatten(1).tolist()):
        rows.setdefault(key, []).extend(row)
    return rows


def history_advantage(history: RewardHistory, keys: Sequence[str], rewards: Tensor) -> Tensor:
    """The z-score of each reward among the rewards of its key in this stage and in the history.

    The std is unbiased (n - 1).  If all rewards of a key are equal, or there is only one, z is exactly 0.
    The function does not change the history; call `history.add` afterwards.
    Shapes: rewards (n) or (n g), one key per row -> like rewards
    """
    z, now = torch.zeros_like(rewards, dtype=torch.float64), by_key(keys, rewards)
    for i, key in enumerate(keys):
        pool = torch.tensor(now[key] + history.past(key), dtype=torch.float64)
        if pool.amax() > pool.amin():
            z[i] = (rewards[i].double() - pool.mean().item()) / (pool.std().item() + EPS)  # SRRL (E6)
    return z.float()


def select_best_worst(z: Tensor, threshold_high: float = 0.5, threshold_low: float = -0.5) -> Tensor:
    """Select the best member of each group if z >= threshold_high, and the worst if z < threshold_low.

    Shapes: z (n g) -> (n g) bool
    """
    best, worst = (torch.nn.functional.one_hot(i, z.shape[1]).bool() for i in (z.argmax(1), z.argmin(1)))
    return (best & (z >= threshold_high)) | (worst & (z < threshold_low))  # SRRL (E7)


def advantage_weights(z: Tensor, clip: float = 5.0, beta_pos: float = 1.0, beta_neg: float = 1.0) -> Tensor:
    """PPO's advantages: clipped z-scores, multiplied by a weight for each sign.  Shapes: z (n g) -> (n g)"""
    return z.clamp(-clip, clip) * torch.where(z > 0, beta_pos, beta_neg)  # SRRL (E8)
