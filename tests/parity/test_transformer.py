"""The decoder-only transformer against Llama's in transformers."""

import torch

from minireflect import rng
from minireflect.models.transformer import Transformer
from tests.models.test_transformer import CONFIG, logits, loud

from .llama import llama


@torch.no_grad()
def test_the_same_weights_give_llamas_logits() -> None:
    ours = loud(Transformer(CONFIG))
    theirs = llama(ours, attention="eager")
    ids = torch.randint(17, (5, 19), generator=rng(0, "ids"))
    # float32 sums in another order, logits up to 10
    assert (logits(ours, ids) - theirs(ids).logits).abs().max() < 1e-4
