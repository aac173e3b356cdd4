"""The decoder-only transformer against Llama's in transformers, and the distribution of tokens against its
logits processors.
"""

import pytest
import torch

from minireflect import rng
from minireflect.models.transformer import SamplingConfig, Transformer
from tests.models.test_transformer import CONFIG, logits, loud

from .llama import llama


@torch.no_grad()
def test_the_same_weights_give_llamas_logits() -> None:
    ours = loud(Transformer(CONFIG))
    theirs = llama(ours, attention="eager")
    ids = torch.randint(17, (5, 19), generator=rng(0, "ids"))
    # float32 sums in another order, logits up to 10
    assert (logits(ours, ids) - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "top_k, top_p, temperature", [(0, 1.0, 1.0), (5, 1.0, 0.5), (0, 0.8, 1.3), (6, 0.6, 0.9)]
)
def test_the_distribution_is_that_of_transformers_warpers(
    top_k: int, top_p: float, temperature: float
) -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(50, 16, generator=rng(0, "logits"))
    wanted = warpers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        wanted = warpers.TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = warpers.TopPLogitsWarper(top_p)(None, wanted)
    found = SamplingConfig(temperature, top_k, top_p).log_probs(logits)
    torch.testing.assert_close(found, wanted.log_softmax(-1))
    assert torch.isfinite(found).sum(1).min() >= 1
