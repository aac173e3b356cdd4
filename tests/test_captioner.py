"""The captioner: what reads whether a picture keeps a rationale."""

import torch
from torch import Tensor

from minireflect.models.matcher import CrossBlock, Matcher, MatcherConfig
from minireflect.models.tokenizer import EOS
from minireflect.streams import choices, rng
from minireflect.world.prompts import draw_prompts
from minireflect.world.rationales import rationale
from minireflect.world.render import render
from tests.small import REASON_WORDS as WORDS


def matcher() -> Matcher:
    torch.manual_seed(0)
    return Matcher(MatcherConfig(len(WORDS), EOS, WORDS.length, width=16, stem=(8, 8), fused=True)).eval()


def pictures(n: int = 5) -> tuple[Tensor, list[str]]:
    draw = choices(0, "captioner", "test")
    scenes = [p.scene(draw) for p in draw_prompts("physical", "train", n, draw)]
    return torch.stack([render(s) for s in scenes]), [rationale(s, rng=draw) for s in scenes]


def test_a_block_takes_no_pictures_and_several_sentences_to_one() -> None:
    torch.manual_seed(0)
    block = CrossBlock(16, 4, fused=True).eval()
    patches, words = (torch.randn(n, 5, 16, generator=rng(0, "cross", n)) for n in (3, 6))
    together = block(words, patches)
    for i in range(6):
        alone = block(words[i : i + 1], patches[i // 2 : i // 2 + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)
    assert block(words[:0], patches[:0]).shape == (0, 5, 16)
