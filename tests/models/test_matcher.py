"""The blocks of the matching model."""

import torch

from minireflect import rng
from minireflect.models.matcher import CrossBlock


def test_fused_blocks_pass_on_what_earlier_tokens_saw() -> None:
    """What a word has seen reaches the next block of later words only if they look at each other there."""
    x, patches = torch.randn(1, 3, 16, generator=rng(0, "x")), torch.randn(1, 4, 16, generator=rng(0, "p"))
    other = torch.cat([-x[:, :1], x[:, 1:]], 1)
    torch.manual_seed(0)
    for fused in (False, True):
        block = CrossBlock(16, 2, fused)
        moved = (block(other, patches) - block(x, patches)).abs().amax((0, 2))  # (t)
        assert moved[0] > 1e-3 and bool((moved[1:] > 1e-4).all()) is fused
        late = torch.cat([x[:, :-1], -x[:, -1:]], 1)
        assert torch.equal(block(late, patches)[:, :-1], block(x, patches)[:, :-1])  # and never the other way


def test_a_block_takes_no_pictures_and_several_sentences_to_one() -> None:
    torch.manual_seed(0)
    block = CrossBlock(16, 4, fused=True).eval()
    patches, words = (torch.randn(n, 5, 16, generator=rng(0, "cross", n)) for n in (3, 6))
    together = block(words, patches)
    for i in range(6):
        alone = block(words[i : i + 1], patches[i // 2 : i // 2 + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)
    assert block(words[:0], patches[:0]).shape == (0, 5, 16)
