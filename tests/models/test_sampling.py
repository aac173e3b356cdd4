"""What is sampled token by token, through the cache, has the log-probability that one pass over the whole
sequence gives it.
"""

import math

import pytest
import torch
from torch import Generator, Tensor

from minireflect import rng
from minireflect.models import transformer

from . import test_actor as actors
from . import test_reasongen as reasongens


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The log-probability of every sampled token, in the order of sampling.  -> (b) each"""
    each: list[Tensor] = []
    real = transformer.pick

    def pick(log_prob: Tensor, generator: Generator | None, all_rows: int | None = None) -> Tensor:
        token = real(log_prob, generator, all_rows)
        each.append(log_prob.gather(1, token[:, None])[:, 0])
        return token

    monkeypatch.setattr(transformer, "pick", pick)
    return each


@torch.no_grad()
@pytest.mark.parametrize("way", reasongens.WAYS)
def test_reasongen_scores_tokens_as_it_sampled_them(way: str, heard: list[Tensor]) -> None:
    net, prompts, sampling = reasongens.model(), reasongens.prompts(), reasongens.WAYS[way]
    out = net.sample(prompts, sampling, rng(0, "write"))
    text, codes = net.log_probs(prompts, out.rationale, out.codes, sampling)
    n = codes.shape[1]
    of_text, of_image = torch.stack(heard[: -2 * n], 1), torch.stack(heard[-2 * n :], 1)
    chosen = out.chosen[:, : of_text.shape[1]]
    assert out.chosen.sum() == chosen.sum() > 0
    torch.testing.assert_close(of_text[chosen], text[:, : of_text.shape[1]][chosen], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        of_image[:, ::2] + of_image[:, 1::2], codes, atol=1e-5, rtol=0
    )  # form, then colours
    again = net.log_probs(prompts, out.rationale, out.codes, sampling)
    assert torch.equal(again[1], codes)  # bit-equal under the same batch shape


@torch.no_grad()
def test_the_actor_scores_tokens_as_it_sampled_them(heard: list[Tensor]) -> None:
    actor, (latents, ids) = actors.small_actor(), actors.inputs(64)
    out = actor.write(latents, ids, rng(0, "write"))
    scored = actor(latents, ids, out.ids)
    assert (scored - torch.stack(heard, 1))[out.chosen].abs().max() < 1e-4  # the cache sums in another order


def test_the_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    found = transformer.SamplingConfig(temperature=0.5).log_probs(logits)
    torch.testing.assert_close(found, (2 * logits).log_softmax(-1))


@pytest.mark.parametrize("ruin", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["transformer.head.weight", "forms.head.2.bias", "colors.head.2.bias"])
def test_logits_of_reasongen_that_are_not_finite_are_not_sampled_from(part: str, ruin: float) -> None:
    net, prompts = reasongens.model(), reasongens.prompts()
    net.get_parameter(part).data.view(-1)[0] = ruin
    with pytest.raises(FloatingPointError, match="a logit of a sampled rationale or picture is not a finite"):
        net.sample(prompts, transformer.SamplingConfig(), rng(0, "write"))


@pytest.mark.parametrize("ruin", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("generator", [None, rng(0, "write")])
def test_logits_of_the_actor_that_are_not_finite_are_not_sampled_from(
    generator: Generator | None, ruin: float
) -> None:
    actor = actors.small_actor()
    actor.transformer.head.weight.data[3, 0] = ruin
    with pytest.raises(FloatingPointError, match="a logit of a sampled edit prompt is not a finite number"):
        actor.write(*actors.inputs(2), generator)
