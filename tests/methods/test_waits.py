"""On a GPU the host waits for a few numbers an iteration, however many steps and updates there are."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from minireflect.methods.learn import Learner, learn
from minireflect.methods.reasongen import Learner as TokenLearner
from minireflect.methods.reasongen import ReasonRLConfig, Rewards, sample_groups, update
from minireflect.methods.rollout import rollout
from minireflect.methods.srrl import SRRLConfig, report
from minireflect.rl.tokens import AdaptiveEntropy
from minireflect.streams import rng
from minireflect.training import adamw
from tests.device import FAR, FarDevice
from tests.small import TEXTS, law_texts, small_pipeline, small_reasongen

pytestmark = pytest.mark.slow
SIZES = {"prompts_per_iteration": 4, "rounds": 1, "redraw": "all", "batch": 4, "group": 2}


def bright(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.sigmoid(10 * images.mean((1, 2, 3)))


def of_srrl(objective: str, steps: int, updates: int) -> Counter[str]:
    config = SRRLConfig(objective=objective, steps=steps, updates=updates, **SIZES)
    pipe = small_pipeline()
    with FarDevice() as device:
        device.move(pipe.unet, pipe.text_encoder, pipe.autoencoder)
        learner = Learner(pipe, config, config.guidance, 16)
        device.move(learner.base)
        assert learner.optimizer.defaults["fused"]
        device.waits.clear()
        out = rollout(pipe, TEXTS, bright, config, 0, 0)
        report(out, learn(learner, out, 1.0, rng(0, "update", 0)), None, config.accept)
    assert len(out.rounds) == 2
    return device.waits


@pytest.mark.parametrize("objective", ["regress", "grpo", "ppo"])
def test_an_iteration_waits_twice_a_round_and_twice_more(objective: str) -> None:
    """A check of the pictures and the rewards of each round; the statistics, and the noise's scale."""
    few, many = of_srrl(objective, 3, 1), of_srrl(objective, 4, 2)
    assert few == many, many - few
    assert sum(few.values()) == 2 * 2 + 2, few


def test_reasongen_waits_for_rewards_and_statistics_but_for_no_token() -> None:
    config = ReasonRLConfig(prompts_per_iteration=2, group=4, updates=2, max_resamples=1)
    counted = []
    for length in (4, 6):
        pipe = small_reasongen(rationale=length)
        with FarDevice() as device:
            device.move(pipe.model, pipe.codec.vq, pipe.codec.autoencoder)
            optimizer = adamw(pipe.model.requires_grad_(True).parameters(), lr=1e-3)
            entropies = tuple(AdaptiveEntropy(0.1, 5e-3, 5e-4) for _ in range(2))
            learner = TokenLearner(pipe, pipe.model, optimizer, entropies)
            alternate = Rewards(lambda images, _: device.mark(torch.arange(len(images)) % 2.0))
            samples, _ = sample_groups(pipe, alternate, law_texts, config, 0, rng(0, "a"))
            sampled = device.waits.copy()
            update(learner, samples, config, rng(0, "b"))
        counted.append((sum(sampled.values()), sum((device.waits - sampled).values())))
    # rewards, verdicts, their means, the rationales as text, the check of the codes, signs of
    # collapse; then the widths of
    # prompts and rationales, and after each update ratio, norm, sums and entropies
    assert counted[0] == counted[1] and counted[0][0] <= 11 and counted[0][1] <= 9, (counted, device.waits)


def test_the_pretended_gpu_sees_what_waits_and_what_cannot_be() -> None:
    with FarDevice() as device:
        x, near = device.mark(torch.arange(4.0)), torch.arange(4.0)
        assert x.device == FAR and (2 * x).device == FAR and near.device != FAR
        (x * 2).sum()
        x.index_select(0, near.long().to(x.device, non_blocking=True))
        x[x > 1] = 0.0  # a fill
        assert not device.waits
        x.sum().item()
        x.tolist()
        x.cpu()
        bool(x.any())
        x.nonzero()
        x[x > 1]
        near.to(x.device)
        assert sum(device.waits.values()) == 7, device.waits
        with pytest.raises(RuntimeError, match="two devices"):
            x + near
        with pytest.raises(RuntimeError, match="indexed by a far one"):
            near[x.long()]
        with pytest.raises(RuntimeError, match="a generator of the CPU"):
            torch.randn(2, generator=rng(0, "x"), device=FAR)
        with pytest.raises(RuntimeError, match="a generator of the CPU"):
            torch.multinomial(x, 1, generator=rng(0, "x"))
