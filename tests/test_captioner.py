"""The captioner: what reads whether a picture keeps a rationale."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minireflect.models.matcher import CrossBlock, Matcher, MatcherConfig
from minireflect.models.tokenizer import EOS
from minireflect.pretrain.matcher import CaptionerTraining, train_captioner
from minireflect.rl.rewards import ACCEPT_WORD, caption_reward
from minireflect.run import Run
from minireflect.streams import choices, rng
from minireflect.world.data import WorldConfig, training_pairs
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


def test_the_reward_is_the_least_probability_of_a_word() -> None:
    """Word by word, a picture and a beginning at a time, nothing filled up."""
    net, (images, thoughts) = matcher(), pictures()
    found = caption_reward(net, WORDS, batch=2)(images, thoughts)
    for image, thought, value in zip(images, thoughts, found.tolist()):
        ids = WORDS([thought])[0]
        ids = ids[: ids.tolist().index(EOS) + 1]
        least = 1.0
        for i in range(1, len(ids)):
            with torch.no_grad():
                states = net.words(net.vision(image[None]), net.text(ids[None, :i]))
            least = min(least, torch.softmax(net.next_word(states)[0, -1].double(), -1)[ids[i]].item())
        assert value == pytest.approx(least, rel=1e-4)
    assert len({round(v, 8) for v in found.tolist()}) == 5


def test_what_is_no_sentence_of_ours_is_not_kept() -> None:
    reward, (images, thoughts) = caption_reward(matcher(), WORDS), pictures()
    assert (reward(images, thoughts) > 0).all()
    bad = ["", "a zebra crossing", " ".join(["red"] * (WORDS.length - 1)), thoughts[3], "   "]
    assert (reward(images, bad) > 0).tolist() == [False, False, False, True, False]
    assert reward(images, [""] * 5).tolist() == [0.0] * 5
    assert reward(images[:0], []).shape == (0,)


def test_a_block_takes_no_pictures_and_several_sentences_to_one() -> None:
    torch.manual_seed(0)
    block = CrossBlock(16, 4, fused=True).eval()
    patches, words = (torch.randn(n, 5, 16, generator=rng(0, "cross", n)) for n in (3, 6))
    together = block(words, patches)
    for i in range(6):
        alone = block(words[i : i + 1], patches[i // 2 : i // 2 + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)
    assert block(words[:0], patches[:0]).shape == (0, 5, 16)


def test_it_learns_to_tell_true_from_false(tmp_path: Path) -> None:
    """From six pictures, which it may learn by heart: the true plan of each is kept, that of another is not."""
    run = Run(tmp_path / "run", {})
    config = CaptionerTraining(
        pictures=6, steps=160, batch=16, lr=4e-3, width=32, arrangements=0.0, altered=0.0
    )
    net = train_captioner(config, WorldConfig(), 0, WORDS, run, torch.device("cpu"))
    losses = [row["loss"] for row in run.metrics("captioner")]
    assert len(losses) == 160 and losses[-1] < 0.3 * losses[0]
    reward = caption_reward(net, WORDS)
    draw = choices(0, "captioner", "pictures")  # the very pictures of the training
    _, scenes, _ = training_pairs(6, replace(WorldConfig(), arrangements=0.0), draw)
    images = torch.stack([render(s) for s in scenes])
    true = reward(images, [rationale(s) for s in scenes])
    false = reward(images, [rationale(s) for s in scenes[1:] + scenes[:1]])
    assert true.min() > ACCEPT_WORD > false.mean() and (true > false).all()
    with pytest.raises(ValueError, match="altered is 2"):
        CaptionerTraining(altered=2.0)
