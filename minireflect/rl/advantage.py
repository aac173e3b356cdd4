"""From rewards to advantages: how much better than its siblings, or than its past, a sample is.

Papers: GRPO (Shao et al. 2024, arXiv 2402.03300); Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) for leaving
the std out; history z-score with best/worst selection: B2-DiffuRL (Hu et al. 2025, arXiv 2503.11240), as SRRL
(arXiv 2505.22407) uses it, E6 to E8.

    GRPO     A = (R - mean of the group) / (std of the group + eps)
    history  z = (R - mean_H) / (std_H + eps)          # H: this stage and the last 8, same prompt     (E6)
             keep the best of a group if z >= 0.5, the worst if z < -0.5                              (E7)
             A = clip(z, -5, 5) * (beta_pos if z > 0 else beta_neg)                                   (E8)

Differs from the released SRRL: eps is 1e-4, not 1e-8 (which turns a reward jitter of 1e-7 into advantages of
1.4); the history is bounded in keys, so that a world of combinatorial prompts does not grow it forever: key
it by scene family.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Normalise = Literal["group", "none", "batch"]


Key = str


HistoryState = dict[str, int | dict[str, list[tuple[int, list[float]]]]]


def zero_variance_groups(rewards: Tensor) -> Tensor:
    """Groups whose members all got the same reward: nothing to learn from them.

    `.sum()` counts them.  Shapes: rewards (n g) -> (n) bool
    """
    return rewards.amax(1) == rewards.amin(1)


def group_advantage(rewards: Tensor, eps: float = 1e-4, normalise: Normalise = "group") -> Tensor:
    """How much better than its group each sample is, in float64 inside, float32 outside.

    Std with n - 1, as in TRL and verl.

    "group" divides by the group's std, which over-weights prompts that are nearly solved or nearly hopeless;
    "batch" divides by the std of all rewards (Flow-GRPO); "none" divides by nothing (Dr. GRPO). A group
    without variance gets exactly 0.
    Shapes: rewards (n g) -> (n g)
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 members, got rewards of shape {tuple(rewards.shape)}")
    R = rewards.double()  # an integer reward divided in its own type would become 0
    A = R - R.mean(1, keepdim=True)
    if normalise == "group":
        A = A / (R.std(1, keepdim=True) + eps)
    elif normalise == "batch":
        A = A / (R.std() + eps)
    elif normalise != "none":
        raise ValueError(f"normalise {normalise!r} is not 'group', 'none' or 'batch'")
    return A.masked_fill(zero_variance_groups(R)[:, None], 0.0).float()


def reward_weights(rewards: Tensor, floor: float) -> Tensor:
    """Share of a group's samples in what is learnt from it, w = r / (sum r + floor), for rewards that are
    probabilities.

    Reward-weighted regression (Peters & Schaal 2007) with r the probability of success itself: the weighted
    samples are the model's own, given that they succeeded. `floor` keeps a group that failed from teaching
    its least bad member.
    Shapes: rewards (n g) -> (n g)
    """
    if (rewards < 0).any():
        raise ValueError(f"rewards as weights must not be negative, got {rewards.min().item():.3g}")
    return rewards.float() / (rewards.float().sum(1, keepdim=True) + floor)


class RewardHistory:
    """The rewards that each key (a prompt, or a family of scenes) got in the last `stages` stages.

    One stage is one `add`. A key that is not seen keeps ageing; when there are more than `max_keys` the one
    unseen for longest goes.
    """

    def __init__(self, stages: int = 8, max_keys: int = 4096) -> None:
        if stages < 0 or max_keys < 1:
            raise ValueError(f"stages {stages} must not be negative, max_keys {max_keys} at least 1")
        self.stages, self.max_keys = stages, max_keys
        self.stage = 0  # stages seen so far
        self._rewards: OrderedDict[Key, deque[tuple[int, list[float]]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rewards)

    def past(self, key: Key) -> list[float]:
        """Every reward of the key that is still remembered, oldest first."""
        return [r for _, rewards in self._rewards.get(key, ()) for r in rewards]

    def add(self, keys: Sequence[Key], rewards: Tensor) -> None:
        """Close a stage: remember its rewards, forget what is too old.

        Shapes: rewards (n) or (n g), one key per row
        """
        for key, row in _by_key(keys, rewards).items():
            self._rewards.setdefault(key, deque()).append((self.stage, row))
            self._rewards.move_to_end(key)
        self.stage += 1
        for key, entries in list(self._rewards.items()):
            while entries and entries[0][0] < self.stage - self.stages:
                entries.popleft()
            if not entries:
                del self._rewards[key]
        while len(self._rewards) > self.max_keys:
            self._rewards.popitem(last=False)

    def state_dict(self) -> HistoryState:
        """Plain numbers, strings, lists: fit for JSON."""
        return {"stage": self.stage, "rewards": {k: [*map(list, v)] for k, v in self._rewards.items()}}

    def load_state_dict(self, state: HistoryState) -> None:
        self.stage = state["stage"]
        self._rewards = OrderedDict(
            (key, deque((stage, list(rewards)) for stage, rewards in entries))
            for key, entries in state["rewards"].items()
        )


def history_advantage(
    history: RewardHistory, keys: Sequence[Key], rewards: Tensor, eps: float = 1e-4
) -> Tensor:
    """z-score of each reward among all rewards of its key, this stage and the remembered ones.

    Call `history.add` afterwards.

    The std is unbiased (n - 1); a lone reward, or a key whose rewards are all equal, gets exactly 0.
    Shapes: rewards (n) or (n g), one key per row -> like rewards
    """
    z = torch.zeros_like(rewards, dtype=torch.float64)
    pools = {
        key: torch.tensor(row + history.past(key), dtype=torch.float64)
        for key, row in _by_key(keys, rewards).items()
    }
    for i, key in enumerate(keys):
        pool = pools[key]
        if pool.amax() > pool.amin():
            z[i] = (rewards[i].double() - pool.mean().to(z)) / (pool.std().to(z) + eps)  # SRRL (E6)
    return z.float()


def _by_key(keys: Sequence[Key], rewards: Tensor) -> dict[Key, list[float]]:
    """A key may stand on several rows of one stage."""
    if len(keys) != len(rewards):
        raise ValueError(f"{len(keys)} keys for {len(rewards)} rows of rewards")
    rows: dict[Key, list[float]] = {}
    for key, row in zip(keys, rewards.double().flatten(1) if rewards.ndim > 1 else rewards.double()[:, None]):
        rows.setdefault(key, []).extend(row.tolist())
    return rows


def select_best_worst(z: Tensor, threshold_high: float = 0.5, threshold_low: float = -0.5) -> Tensor:
    """Of each group keep the best if it is good enough and the worst if it is bad enough.

    Shapes: z (n g) -> (n g) bool
    """
    best = torch.zeros_like(z, dtype=torch.bool).scatter_(1, z.argmax(1, keepdim=True), True)
    worst = torch.zeros_like(z, dtype=torch.bool).scatter_(1, z.argmin(1, keepdim=True), True)
    return (best & (z >= threshold_high)) | (worst & (z < threshold_low))  # SRRL (E7)


def advantage_weights(z: Tensor, clip: float = 5.0, beta_pos: float = 1.0, beta_neg: float = 1.0) -> Tensor:
    """z-scores as PPO's advantages: bounded, good and bad weighted apart.  Shapes: z (n g) -> (n g)"""
    return z.clamp(-clip, clip) * torch.where(z > 0, beta_pos, beta_neg)  # SRRL (E8)
