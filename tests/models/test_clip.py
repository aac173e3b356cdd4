"""CLIP's two encoders have the published sizes, normalise as stated, and learn; the blocks of the matcher."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from minireflect import rng
from minireflect.models.clip import (
    CLIP,
    OPENAI_MEAN,
    OPENAI_STD,
    CLIPConfig,
    CrossBlock,
    TextConfig,
    TextEncoder,
    VisionConfig,
    VisionEncoder,
)
from tests.small import shaken

EOS = 49
TEXT = TextConfig(vocabulary=50, eos=EOS, length=9, width=32, layers=3, heads=4)
VISION = VisionConfig(size=24, patch=8, width=40, layers=2, heads=2)

# the published sizes
TEXT_L = TextConfig(vocabulary=49_408, eos=49_407)  # of SD 1.x, and the first of SDXL's two
TEXT_H = replace(TEXT_L, width=1024, layers=23, heads=16, quick_gelu=False)  # of SD 2.x: 23 of the 24 layers
TEXT_BIGG = replace(
    TEXT_H, width=1280, layers=32, heads=20, penultimate=True, projection=1280
)  # SDXL's second
VISION_L = VisionConfig(mean=OPENAI_MEAN, std=OPENAI_STD)
CLIP_L = CLIPConfig(TEXT_L, VISION_L)
VISION_H = replace(VISION_L, width=1280, layers=32, quick_gelu=False)
CLIP_H = CLIPConfig(replace(TEXT_H, layers=24), VISION_H, width=1024)  # ViT-H/14, the reward of SRRL


def similarity(clip: CLIP, images: Tensor, ids: Tensor) -> Tensor:
    """Scaled cosine of every picture with every sentence.  Shapes: images (b 3 h w), ids (b2 t) -> (b b2)"""
    return clip.logit_scale.exp() * clip.encode_image(images) @ clip.encode_text(ids).T


def sentences() -> Tensor:
    """Three sentences of different lengths, padded with end-of-text as in CLIP-L or with 0 as in bigG."""
    ids = torch.randint(2, EOS, (3, 9))
    ids[0, 4:] = EOS
    ids[1, 8] = EOS
    ids[2, 2], ids[2, 3:] = EOS, 0
    return ids


@pytest.mark.parametrize(
    "network, config, parameters, tensors",
    [
        (
            CLIP,
            CLIPConfig(TextConfig(100, 99, 32, 96, 3, 4), VisionConfig(64, 8, 96, 3, 4), 96),
            727_489,
            110,
        ),
        (TextEncoder, TEXT_L, 123_060_480, 196),
        (TextEncoder, TEXT_H, 340_387_840, 372),
        (TextEncoder, TEXT_BIGG, 694_659_840, 517),
        (CLIP, CLIP_L, 427_616_513, 590),
    ],
    ids=["toy", "text L", "text H", "text bigG", "L/14"],
)
def test_published_sizes(
    network: type[CLIP] | type[TextEncoder], config: CLIPConfig | TextConfig, parameters: int, tensors: int
) -> None:
    with torch.device("meta"):
        clip = network(config)
    assert sum(p.numel() for p in clip.parameters()) == parameters
    assert len(clip.state_dict()) == tensors


def test_a_token_sees_only_the_tokens_before_it() -> None:
    torch.manual_seed(0)
    encoder = shaken(TextEncoder(TEXT), 0.1)
    ids = sentences()
    changed = ids.clone()
    changed[:, 5] = 7
    before, after = encoder(ids), encoder(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_embeddings_have_length_one() -> None:
    clip = CLIP(CLIPConfig(TEXT, VISION, width=16))
    assert torch.allclose(clip.encode_text(sentences()).norm(dim=-1), torch.ones(3))
    assert torch.allclose(clip.encode_image(torch.randn(2, 3, 24, 24)).norm(dim=-1), torch.ones(2))


def test_normalisation_is_that_of_openai_on_pictures_from_0_to_1() -> None:
    torch.manual_seed(0)
    plain = VisionEncoder(VISION)
    normalising = VisionEncoder(VisionConfig(24, 8, 40, 2, 2, mean=OPENAI_MEAN, std=OPENAI_STD))
    normalising.load_state_dict(plain.state_dict())
    unit = torch.rand(2, 3, 24, 24)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    assert torch.allclose(normalising(2 * unit - 1), plain((unit - mean) / std), atol=1e-5)


def test_learns_which_picture_belongs_to_which_sentence() -> None:
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(TEXT, VISION, width=16))
    images, ids = torch.randn(3, 3, 24, 24), sentences()
    optimizer = torch.optim.Adam(clip.parameters(), lr=1e-3, fused=True)
    losses = []
    for _ in range(40):
        logits = similarity(clip, images, ids)
        loss = nn.functional.cross_entropy(logits, torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20
    assert similarity(clip, images, ids).argmax(dim=1).tolist() == [0, 1, 2]


def test_a_sentence_is_pooled_at_its_first_end() -> None:
    """Padded with ends, with 0, or not at all."""
    hidden = torch.arange(27.0).view(3, 9, 1)
    assert TextEncoder(TEXT).pooled(hidden, sentences()).flatten().tolist() == [4, 9 + 8, 18 + 2]


def test_refuses_what_does_not_fit() -> None:
    text, vision = TextEncoder(TEXT), VisionEncoder(VISION)
    with pytest.raises(ValueError, match="10 tokens, but the encoder has 9 positions"):
        text(torch.zeros(1, 10, dtype=torch.long))
    ids = sentences()
    ids[1, 8] = 3
    with pytest.raises(ValueError, match="1 of 3 sentences have no end-of-text token 49"):
        text.pooled(text(ids), ids)
    with pytest.raises(ValueError, match="32 x 32, expected 24 x 24"):
        vision(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="size 30 is not a multiple of patch 8"):
        VisionConfig(size=30, patch=8)
    with pytest.raises(ValueError, match=r"a stem \(8,\) makes patches of 4 pixels"):
        VisionConfig(size=24, patch=8, stem=(8,))


def test_a_convolutional_stem_makes_one_token_a_patch_and_keeps_its_place() -> None:
    """A change in one corner of the picture stays near that corner in the stem: patch p sees 8 pixels and a
    margin.
    """
    config = VisionConfig(size=64, patch=8, width=40, layers=1, heads=2, stem=(8, 16))
    vision = VisionEncoder(config)
    images = torch.zeros(1, 3, 64, 64)
    assert vision(images).shape == (1, 65, 40)
    stem = vision.patch.eval()
    for (
        res
    ) in stem.res:  # a group norm reads the whole picture: left out, to see how far the convolutions reach
        res.norm1 = res.norm2 = nn.Identity()
    with torch.no_grad():
        blank = stem(images)
        images[..., :8, :8] = 1.0
        changed = (stem(images) - blank).abs().sum(1)[0] > 1e-6
    assert changed[0, 0] and not changed[4:].any() and not changed[:, 4:].any()


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


def test_embeddings_begin_with_the_std_that_is_stated() -> None:
    torch.manual_seed(0)
    text = TextEncoder(replace(TEXT, length=200, init_std=0.3))
    assert text.token.weight.std().item() == pytest.approx(0.3, rel=0.1)
    assert text.position.weight.std().item() == pytest.approx(0.15, rel=0.1)
