"""Rewards: learned from words, exact from pixels, and the size of a JPEG."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from minireflect import load_reward, rng
from minireflect.checkpoints.ours import SHIPPED
from minireflect.models.clip import Matcher, MatcherConfig
from minireflect.models.tokenizer import EOS
from minireflect.rl.rewards import (
    caption_reward,
    compressibility,
    incompressibility,
    inspector_reward,
    reward_beside,
)
from minireflect.streams import choices
from minireflect.world.captions import rationale
from minireflect.world.laws import render
from minireflect.world.prompts import draw_prompts
from tests.small import REASON_WORDS as WORDS


def matcher() -> Matcher:
    torch.manual_seed(0)
    return Matcher(MatcherConfig(len(WORDS), EOS, WORDS.length, width=16, stem=(8, 8), fused=True)).eval()


def pictures(n: int = 5) -> tuple[Tensor, list[str]]:
    draw = choices(0, "captioner", "test")
    scenes = [p.scene(draw) for p in draw_prompts("physical", "train", n, draw)]
    return torch.stack([render(s) for s in scenes]), [rationale(s, rng=draw) for s in scenes]


def test_the_caption_reward_is_the_smallest_probability_of_a_word() -> None:
    """By hand, word by word and without padding."""
    net, (images, thoughts) = matcher(), pictures()
    found = caption_reward(net, WORDS, batch=2)(images, thoughts)
    for image, thought, value in zip(images, thoughts, found.tolist()):
        ids = WORDS([thought])[0]
        ids = ids[: ids.tolist().index(EOS) + 1]
        least = 1.0
        for i in range(1, len(ids)):
            with torch.no_grad():
                states = net.attend(net.vision(image[None]), net.text(ids[None, :i]))
            least = min(least, torch.softmax(net.next_word(states)[0, -1].double(), -1)[ids[i]].item())
        assert value == pytest.approx(least, rel=1e-4)
    assert len({round(v, 8) for v in found.tolist()}) == 5


def test_unreadable_rationales_get_zero() -> None:
    reward, (images, thoughts) = caption_reward(matcher(), WORDS), pictures()
    assert (reward(images, thoughts) > 0).all()
    bad = ["", "a zebra crossing", " ".join(["red"] * (WORDS.length - 1)), thoughts[3], "   "]
    assert (reward(images, bad) > 0).tolist() == [False, False, False, True, False]
    assert reward(images, [""] * 5).tolist() == [0.0] * 5
    assert reward(images[:0], []).shape == (0,)


def test_the_inspector_reward_agrees_with_the_scenes() -> None:
    draw = choices(0, "inspector")
    prompts = [p for kind in ("physical", "unconventional") for p in draw_prompts(kind, "held-out", 16, draw)]
    images = torch.stack([render(p.scene(draw)) for p in prompts])
    texts = [p.text for p in prompts]
    assert inspector_reward(images, texts).sum() == 32
    assert inspector_reward(images, texts[1:] + texts[:1]).sum() < 4
    with pytest.raises(ValueError, match="cannot tell what fulfils"):
        inspector_reward(images[:1], ["a ball of ball"])


def test_a_folder_without_a_reward_falls_back_to_the_shipped_one(tmp_path: Path) -> None:
    images, _ = pictures()
    texts = ["a red ball"] * len(images)
    shipped = load_reward()(images, texts)
    assert torch.equal(reward_beside(tmp_path)(images, texts), shipped)
    assert torch.equal(reward_beside(SHIPPED)(images, texts), shipped)


def test_incompressibility_is_the_size_of_the_jpeg(tmp_path: Path) -> None:
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = torch.stack([torch.zeros(3, 64, 64), noise])
    flat, rough = incompressibility(images, ["", ""]).tolist()
    picture = ((noise + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(tmp_path / "noise.jpg", quality=95)
    assert rough == pytest.approx((tmp_path / "noise.jpg").stat().st_size / 1000)
    assert flat < 1 < rough
    assert compressibility(images, ["", ""]).tolist() == [-flat, -rough]


@pytest.mark.parametrize("size", [(64, 64), (17, 33), (256, 128)])
def test_the_jpeg_has_torchvisions_size(size: tuple[int, int]) -> None:
    """DDPO's own code and ours before wrote other files, of the same length."""
    from torchvision.io import encode_jpeg

    images = torch.rand(3, 3, *size, generator=rng(0, "jpeg")) * 2 - 1
    sizes = [len(encode_jpeg(((x + 1) * 127.5).round().byte(), 95)) / 1000 for x in images]
    assert incompressibility(images, [""] * 3).tolist() == pytest.approx(sizes)
