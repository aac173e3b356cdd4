"""From rewards to advantages: how much better a sample is than the others of its group, or than past samples.

GRPO (Shao et al. 2024, arXiv 2402.03300); history with best and worst selection: B2-DiffuRL (Hu et al. 2025,
arXiv 2503.11240), as SRRL (arXiv 2505.22407) uses it, E6 to E8.

    group    A = (R - mean of the group) / (std of the group + eps)                  GRPO
    shrunk   A = 2 (R - (sum of the group + 1/2) / (n + 1))                  ours, for rewards in [0, 1]
    history  z = (R - mean_H) / (std_H + eps)    # H: this stage and the last 8, of the same prompt    (E6)
             keep the best of a group if z >= 0.5, the worst if z < -0.5                               (E7)
             A = clip(z, -5, 5) * (beta_pos if z > 0 else beta_neg)                                    (E8)

Differs from the released SRRL:
- eps is 1e-4, not 1e-8, which turns a reward jitter of 1e-7 into advantages of 1.4
- the number of keys in the history is bounded: a world of combinatorial prompts would let it grow for ever
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ranges import finite

EPS = 1e-4  # added to the std of rewards
PRIOR = 0.5  # expected reward of an unknown prompt, where rewards are probabilities

Rewards = dict[str, list[list[float]]]  # by key, oldest first: [stage, reward]


def given(rewards: Tensor) -> Tensor:
    """The rewards themselves, NaN where there is none.  Raises FloatingPointError when one is infinite."""
    finite(rewards.nan_to_num(0.0, torch.inf, -torch.inf), "a reward")
    return rewards


def zero_variance_groups(rewards: Tensor) -> Tensor:
    """Groups whose members all got the same reward: nothing can be learnt from comparing them.

    Shapes: rewards (n g), NaN where a group has fewer members -> (n) bool
    """
    none = rewards.isnan()
    return rewards.masked_fill(none, -torch.inf).amax(1) == rewards.masked_fill(none, torch.inf).amin(1)


def group_advantage(rewards: Tensor, eps: float = EPS) -> Tensor:
    """Standard deviations above the mean of its group; exactly 0 in a group without variance.

    Computed in float64; the std is unbiased (n - 1), as in TRL and verl.  Raises ValueError for
    groups of one.
    Shapes: rewards (n g), NaN where a group has fewer members -> (n g) float32
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 members, got rewards of shape {tuple(rewards.shape)}")
    R = given(rewards).double()  # an integer reward divided in its own type would become 0
    off = R - R.nanmean(1, keepdim=True)
    others = (~R.isnan()).sum(1, keepdim=True) - 1
    std = ((off**2).nansum(1, keepdim=True) / others.clamp(min=1)).sqrt()
    return (off / (std + eps)).masked_fill(zero_variance_groups(R)[:, None], 0.0).float()


def shrunk_advantage(rewards: Tensor) -> Tensor:
    """Difference from the mean reward of the prompt, for rewards that are probabilities of success.

    The mean is shrunk towards 1/2 by one imagined sample, so that a prompt with a single picture, or with
    equal ones, still teaches: A is r - 1/2 for one picture.
    Shapes: rewards (n g), NaN where a group has fewer members -> (n g) in [-1.5, 1.5]
    """
    R = given(rewards).float()
    n = (~R.isnan()).sum(1, keepdim=True)
    return 2 * (R - (R.nansum(1, keepdim=True) + PRIOR) / (n + 1))


def reward_weights(rewards: Tensor, floor: float) -> Tensor:
    """Weights of a group's samples in the regression, for rewards that are probabilities of success.

        w = r / (sum r + floor)

    Reward-weighted regression (Peters & Schaal 2007): the weighted samples are the model's own, given that
    they succeeded.  `floor` keeps the weights of a failed group small.  Raises ValueError for a negative
    reward.
    Shapes: rewards (n g), NaN where a group has fewer members -> (n g)
    """
    if (rewards < 0).any():
        raise ValueError(f"rewards as weights must not be negative, got {rewards.min().item():.3g}")
    return given(rewards).float() / (rewards.float().nansum(1, keepdim=True) + floor)


class RewardHistory:
    """The rewards that each key (a prompt, or a family of scenes) got in the last `stages` stages.

    One stage is one `add`.  Of more than `max_keys` keys, those unseen for longest are forgotten.
    """

    def __init__(self, stages: int = 8, max_keys: int = 4096) -> None:
        self.stages, self.max_keys = stages, max_keys
        self.stage = 0  # stages seen so far
        self.rewards: Rewards = {}  # in the order in which keys were last seen

    def past(self, key: str) -> list[float]:
        """Every reward of the key that is still remembered, oldest first."""
        return [reward for _, reward in self.rewards.get(key, ())]

    def add(self, keys: Sequence[str], rewards: Tensor) -> None:
        """Close a stage: remember its rewards, forget what is too old.

        Shapes: rewards (n) or (n g), one key per row
        """
        new = {k: [[self.stage, r] for r in row] for k, row in by_key(keys, rewards).items()}
        unseen = {k: entries for k, entries in self.rewards.items() if k not in new}
        known = unseen | {k: self.rewards.get(k, []) + entries for k, entries in new.items()}
        self.stage += 1
        oldest = self.stage - self.stages
        recent = {k: [e for e in entries if e[0] >= oldest] for k, entries in known.items()}
        self.rewards = dict([(k, entries) for k, entries in recent.items() if entries][-self.max_keys :])

    def state_dict(self) -> dict[str, int | Rewards]:
        """Plain numbers, strings, lists: fit for JSON."""
        return {"stage": self.stage, "rewards": self.rewards}

    def load_state_dict(self, state: dict[str, int | Rewards]) -> None:
        self.stage, self.rewards = state["stage"], state["rewards"]


def by_key(keys: Sequence[str], rewards: Tensor) -> dict[str, list[float]]:
    """The rewards of each key, which may stand on several rows.  Shapes: rewards (n) or (n g)"""
    if len(keys) != len(rewards):
        raise ValueError(f"{len(keys)} keys for {len(rewards)} rows of rewards")
    rows: dict[str, list[float]] = {}
    for key, row in zip(keys, finite(rewards, "a reward").double()[..., None].flatten(1).tolist()):
        rows.setdefault(key, []).extend(row)
    return rows


def history_advantage(history: RewardHistory, keys: Sequence[str], rewards: Tensor) -> Tensor:
    """z-score of each reward among all rewards of its key, this stage's and the remembered ones.

    Call `history.add` afterwards.  The std is unbiased (n - 1); a lone reward, or a key whose rewards are all
    equal, gets exactly 0.
    Shapes: rewards (n) or (n g), one key per row -> like rewards
    """
    z, now = torch.zeros_like(rewards, dtype=torch.float64), by_key(keys, rewards)
    for i, key in enumerate(keys):
        pool = torch.tensor(now[key] + history.past(key), dtype=torch.float64)
        if pool.amax() > pool.amin():
            z[i] = (rewards[i].double() - pool.mean().item()) / (pool.std().item() + EPS)  # SRRL (E6)
    return z.float()


def select_best_worst(z: Tensor, threshold_high: float = 0.5, threshold_low: float = -0.5) -> Tensor:
    """Of each group keep the best if it is good enough, and the worst if it is bad enough.

    Shapes: z (n g) -> (n g) bool
    """
    best = torch.zeros_like(z, dtype=torch.bool).scatter_(1, z.argmax(1, keepdim=True), True)
    worst = torch.zeros_like(z, dtype=torch.bool).scatter_(1, z.argmin(1, keepdim=True), True)
    return (best & (z >= threshold_high)) | (worst & (z < threshold_low))  # SRRL (E7)


def advantage_weights(z: Tensor, clip: float = 5.0, beta_pos: float = 1.0, beta_neg: float = 1.0) -> Tensor:
    """PPO's advantages: clipped z-scores, weighted by their sign.  Shapes: z (n g) -> (n g)"""
    return z.clamp(-clip, clip) * torch.where(z > 0, beta_pos, beta_neg)  # SRRL (E8)
