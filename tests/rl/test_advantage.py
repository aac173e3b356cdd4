"""Advantages: invariances, degenerate groups, and the history against a reference in numpy."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minireflect.rl.advantage import (
    RewardHistory,
    advantage_weights,
    group_advantage,
    history_advantage,
    reward_weights,
    select_best_worst,
    shrunk_advantage,
    zero_variance_groups,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_against_numpy() -> None:
    rewards = draw(5, 7)
    R = rewards.double().numpy()
    want = (R - R.mean(1, keepdims=True)) / (R.std(1, ddof=1, keepdims=True) + 1e-4)
    got = group_advantage(rewards)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)
    assert got.dtype == torch.float32


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 7), st.floats(-100, 100), st.floats(0.1, 10), st.integers(0, 99))
def test_shift_and_scale_do_not_matter(g: int, shift: float, scale: float, seed: int) -> None:
    rewards = draw(3, g, seed=seed).double()
    A = group_advantage(rewards, eps=0)
    torch.testing.assert_close(group_advantage(rewards * scale + shift, eps=0), A, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(A.sum(1), torch.zeros(3), atol=1e-5, rtol=0)
    assert A.argsort(1).equal(rewards.argsort(1))


def test_groups_without_variance_get_exactly_zero() -> None:
    rewards = torch.tensor([[0.1] * 7, [0.0, 1, 0, 1, 0, 1, 0]], dtype=torch.float64)
    assert rewards[0].mean() != 0.1  # the mean of equal numbers is not always that number
    A = group_advantage(rewards, eps=1e-12)
    assert (A[0] == 0).all() and (A[1] != 0).all()
    assert zero_variance_groups(rewards).tolist() == [True, False]
    assert (group_advantage(torch.ones(3, 4)) == 0).all()


def test_integer_and_jittered_rewards() -> None:
    # integers do not silently become 0
    assert group_advantage(torch.tensor([[0, 1, 1, 0]])).abs().min() > 0.5
    jitter = torch.tensor([[0.5, 0.5 + 1e-7]], dtype=torch.float64)
    assert group_advantage(jitter).abs().max() < 1e-3 and group_advantage(jitter, eps=1e-8).abs().max() > 0.6


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"\(4, 1\)"):
        group_advantage(torch.zeros(4, 1))
    with pytest.raises(ValueError, match="2 keys for 3 rows"):
        history_advantage(RewardHistory(), ["a", "b"], torch.zeros(3, 2))


def test_history_against_numpy() -> None:
    """Twelve stages, keys that come and go and repeat within a stage, windows of 3 stages."""
    rng = np.random.default_rng(0)
    history, log = RewardHistory(stages=3), []
    for stage in range(12):
        keys = [str(k) for k in rng.integers(0, 4, size=3)]
        rewards = rng.normal(size=(3, 2))
        got = history_advantage(history, keys, torch.from_numpy(rewards))
        log.append((keys, rewards))
        for i, key in enumerate(keys):
            pool = [
                r for ks, rs in log[max(0, stage - 3) :] for k, row in zip(ks, rs) if k == key for r in row
            ]
            want = (rewards[i] - np.mean(pool)) / (np.std(pool, ddof=1) + 1e-4)
            np.testing.assert_allclose(got[i].numpy(), want, rtol=1e-5, atol=1e-6)
        history.add(keys, torch.from_numpy(rewards))
    assert history.stage == 12


def test_history_degenerate_pools_and_flat_rewards() -> None:
    history = RewardHistory()
    assert history_advantage(history, ["a", "b"], torch.tensor([3.0, 4.0])).tolist() == [
        0,
        0,
    ]  # lone: no std, no NaN
    history.add(["a"], torch.tensor([3.0]))
    assert history_advantage(history, ["a"], torch.tensor([3.0])).tolist() == [0]  # all equal
    z = history_advantage(history, ["a"], torch.tensor([5.0]))
    assert z.tolist() == pytest.approx([1 / 2**0.5], rel=1e-3)  # pool (3, 5): std 2 / sqrt(2)
    assert history.past("a") == [3.0] and history.past("unseen") == []  # asking does not record


def test_history_is_bounded() -> None:
    history = RewardHistory(stages=2, max_keys=3)
    for i in range(50):
        history.add([f"k{i}", "always"], torch.tensor([float(i), 1.0]))
        assert len(history.rewards) <= 3 and len(history.past("always")) <= 2
    assert history.past("k49") == [49.0] and history.past("k47") == []
    for _ in range(2):
        history.add([], torch.zeros(0))  # stages in which nothing is seen age everything away
    assert len(history.rewards) == 0
    crowded = RewardHistory(stages=9, max_keys=2)
    for key in ("a", "b", "a", "c"):
        crowded.add([key], torch.ones(1))
    assert crowded.past("b") == [] and crowded.past("a") == [1, 1]  # b was unseen for longest
    paper = RewardHistory()  # the last eight stages
    for i in range(10):
        paper.add(["a"], torch.tensor([float(i)]))
    assert paper.past("a") == [2, 3, 4, 5, 6, 7, 8, 9]
    none = RewardHistory(stages=0)
    none.add(["a"], torch.ones(1))
    assert len(none.rewards) == 0


def test_history_survives_json() -> None:
    history = RewardHistory(stages=3, max_keys=5)
    for i in range(6):
        history.add([f"k{i % 4}", "same"], draw(2, 3, seed=i))
    again = RewardHistory(**json.loads(json.dumps(vars(history))))
    for i in range(6, 12):
        keys, rewards = [f"k{i % 4}", "same"], draw(2, 3, seed=i)
        assert history_advantage(history, keys, rewards).equal(history_advantage(again, keys, rewards))
        history.add(keys, rewards), again.add(keys, rewards)
        assert history == again


def test_best_and_worst() -> None:
    z = torch.tensor(
        [
            [0.1, 0.9, -0.7, 0.6],  # one of each; the second best is not kept
            [0.4, 0.2, -0.4, 0.1],  # neither passes
            [1.0, 2.0, 3.0, 1.5],  # all above their history: a positive only
            [-1.0, -2.0, -0.6, -1.5],  # all below: a negative only
            [0.5, 0.5, -0.5, -0.5],  # the thresholds themselves: >= high, but < low; of equals the first
        ]
    )
    mask = select_best_worst(z)
    assert mask.nonzero().tolist() == [[0, 1], [0, 2], [2, 2], [3, 1], [4, 0]]
    assert select_best_worst(z, 2.5, -1.9).nonzero().tolist() == [[2, 2], [3, 1]]


def test_weights() -> None:
    z = torch.tensor([-9.0, -2.0, 0.0, 2.0, 9.0])
    assert advantage_weights(z).tolist() == [-5, -2, 0, 2, 5]
    assert advantage_weights(z, clip=3.0, beta_pos=2.0, beta_neg=0.5).tolist() == [-1.5, -1.0, 0, 4, 6]


def test_global_randomness_is_untouched() -> None:
    before = torch.get_rng_state()
    history = RewardHistory()
    history.add(["a"], torch.rand(1, 3, generator=torch.Generator().manual_seed(0)))
    group_advantage(draw(3, 4)), history_advantage(history, ["a"], draw(1, 3))
    assert torch.get_rng_state().equal(before)


def test_reward_weights_are_shares_and_a_failed_group_has_none() -> None:
    """By hand: 0.9 + 0.1 of 1.5, and a group of zeros."""
    weights = reward_weights(torch.tensor([[0.9, 0.1], [0.0, 0.0], [1.0, 1.0]]), 0.5)
    assert torch.allclose(weights, torch.tensor([[0.6, 0.1 / 1.5], [0.0, 0.0], [0.4, 0.4]]))
    with pytest.raises(ValueError, match="must not be negative"):
        reward_weights(torch.tensor([[-0.5, 1.0]]), 0.5)


def test_an_infinite_reward_is_refused_and_a_missing_one_is_not() -> None:
    functions = [group_advantage, shrunk_advantage, lambda R: reward_weights(R, 0.5)]
    functions.append(lambda R: history_advantage(RewardHistory(), ["a"], R))
    for function in functions:
        with pytest.raises(FloatingPointError, match="a reward is not a finite number"):
            function(torch.tensor([[1.0, torch.inf]]))
    for function in functions[:3]:
        assert function(torch.tensor([[1.0, 0.0, torch.nan]]))[0, :2].isfinite().all()


def test_groups_of_unlike_sizes_against_numpy_and_fractions() -> None:
    """The std is over the members that a group has; the mean of `shrunk` counts one more of reward 1/2."""
    R = np.array([[1.0, 0.0, 0.5, np.nan], [0.25, 1.0, np.nan, np.nan], [0.75, np.nan, np.nan, np.nan]])
    want = (R - np.nanmean(R, 1, keepdims=True))[:2] / (np.nanstd(R[:2], 1, ddof=1, keepdims=True) + 0.1)
    np.testing.assert_allclose(group_advantage(torch.tensor(R), eps=0.1)[:2].numpy(), want, rtol=1e-6)
    same = torch.tensor([[2.0, 2.0, np.nan], [2.0, 1.0, np.nan]])
    assert all(zero_variance_groups(v).tolist() == [True, False] for v in (same, -same))
    of_three, of_two = [1.0, -1.0, 0.0], [-2 / 3, 5 / 6]  # 2 (R - 2/4) and 2 (R - (7/4) / 3)
    for row, wanted in zip(shrunk_advantage(torch.tensor(R)), (of_three, of_two, [0.25])):
        assert row[: len(wanted)].tolist() == pytest.approx(wanted) and row[len(wanted) :].isnan().all()


def test_the_history_has_room_for_four_thousand_prompts() -> None:
    history, keys = RewardHistory(), [str(i) for i in range(4_100)]
    history.add(keys, torch.arange(4_100.0))
    assert [*history.rewards] == keys[-4096:] and history.past("4099") == [4099] and history.past("3") == []
