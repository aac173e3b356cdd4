"""The UNet has the published sizes, reads all its inputs, learns, and checkpoints its activations without a
change.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minireflect import rng
from minireflect.models.unet import SMALL_UNET, TOY_UNET, Added, UNet, UNetConfig, timestep_embedding
from tests.small import shaken

TINY = UNetConfig(
    channels=(16, 32), depths=(1, 1), mid_depth=1, context_width=12, res_blocks=1, heads=2, groups=4
)

SD15 = UNetConfig((320, 640, 1280, 1280), (1, 1, 1, 0), mid_depth=1, context_width=768, heads=8)
SD21 = replace(SD15, context_width=1024, heads=None, head_width=64, use_linear_projection=True)
SDXL = UNetConfig(
    (320, 640, 1280), (0, 2, 10), mid_depth=10, context_width=2048, head_width=64, use_linear_projection=True,
    pooled_width=1280,
)  # fmt: skip


def batch(config: UNetConfig, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, config.in_channels, size, size)
    return x, torch.tensor([0, 371, 999]), torch.randn(3, 5, config.context_width)


@pytest.mark.parametrize(
    "config, parameters, tensors",
    [
        (TOY_UNET, 2_209_540, 260),
        (SD15, 859_520_964, 686),
        (SD21, 865_910_724, 686),
        (SDXL, 2_567_463_684, 1_680),
    ],
    ids=["toy", "sd15", "sd21", "sdxl"],
)
def test_published_sizes(config: UNetConfig, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        unet = UNet(config)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert len(unet.state_dict()) == tensors


def test_starts_by_predicting_zero() -> None:
    assert not UNet(TINY)(*batch(TINY)).any()


@pytest.mark.slow
def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    unet = UNet(TINY)
    x, t, context = batch(TINY, size=4)
    noise = torch.randn_like(x)
    optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3, fused=True)
    losses = []
    for _ in range(40):
        loss = (unet(x, t, context) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 50


def test_every_input_reaches_the_output() -> None:
    torch.manual_seed(0)
    config = UNetConfig(
        (32, 64, 64),
        (0, 2, 3),
        3,
        24,
        head_width=16,
        use_linear_projection=True,
        groups=8,
        pooled_width=20,
        size_width=10,
    )
    unet = shaken(UNet(config))
    x, t, context = batch(config)
    pooled, sizes = torch.randn(3, 20), torch.randint(0, 1024, (3, 6))
    base = unet(x, t, context, Added(pooled, sizes))
    assert not torch.allclose(unet(x, t + 100, context, Added(pooled, sizes)), base, atol=1e-4)
    assert not torch.allclose(unet(x, t, context + 1, Added(pooled, sizes)), base, atol=1e-4)
    assert not torch.allclose(unet(x, t, context, Added(pooled + 1, sizes)), base, atol=1e-4)
    assert not torch.allclose(unet(x, t, context, Added(pooled, sizes + 100)), base, atol=1e-4)


def test_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    unet = shaken(UNet(TINY))
    x, t, context = batch(TINY)
    runs = []
    unet.mid.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    gradients = []
    for unet.checkpointing in (False, True):
        unet.zero_grad()
        unet(x, t, context).square().mean().backward()
        gradients.append([p.grad.clone() for p in unet.parameters()])
    assert len(runs) == 3  # once without, and twice with: forward, and again for the gradients
    assert all(torch.equal(a, b) for a, b in zip(*gradients))  # the same operations in the same order


def test_timestep_embedding_is_cosines_then_sines() -> None:
    waves = timestep_embedding(torch.tensor([0, 7]), 6)
    assert waves[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert waves[1, 0] == torch.tensor(7.0).cos() and waves[1, 3] == torch.tensor(7.0).sin()


def test_refuses_what_does_not_fit() -> None:
    unet = UNet(TINY)
    x, t, context = batch(TINY)
    with pytest.raises(ValueError, match="7 x 7 are not a multiple of 2"):
        unet(x[:, :, :7, :7], t, context)
    with pytest.raises(ValueError, match="width 11, expected 12"):
        unet(x, t, context[..., :11])
    with pytest.raises(ValueError, match="pooled_width"):
        unet(x, t, context, Added(torch.zeros(3, 4), torch.zeros(3, 6)))
    with pytest.raises(ValueError, match="channels 20 is not a multiple of groups 32"):
        UNetConfig(channels=(20,), depths=(1,), mid_depth=1, context_width=8, heads=2)
    with pytest.raises(ValueError, match="channels 32 is not a multiple of head_width 24"):
        UNetConfig(channels=(32,), depths=(1,), mid_depth=1, context_width=8, head_width=24)
    for heads in ((), (2, 2)):
        with pytest.raises(ValueError, match=f"1 channels but {len(heads)} heads: give one per level"):
            UNetConfig(channels=(32,), depths=(1,), mid_depth=1, context_width=8, heads=heads)
    with pytest.raises(ValueError, match="heads or head_width"):
        UNetConfig(channels=(32,), depths=(1,), mid_depth=1, context_width=8)


def test_side_adds_a_learned_map_of_positions() -> None:
    """`side` adds one learned map behind the first convolution, zero at the start: the same network until it
    is trained.
    """
    with_map, without = UNet(SMALL_UNET), UNet(replace(SMALL_UNET, side=None))
    assert with_map.where.shape == (32, 8, 8) and not with_map.where.any()
    missing = with_map.load_state_dict(without.state_dict(), strict=False).missing_keys
    assert missing == ["where"]
    x, context = torch.randn(2, 4, 8, 8, generator=rng(0, "x")), torch.randn(2, 3, 64, generator=rng(0, "c"))
    (
        torch.nn.init.normal_(with_map.conv_out.weight),
        without.load_state_dict(with_map.state_dict(), strict=False),
    )
    assert torch.equal(with_map(x, torch.tensor(5), context), without(x, torch.tensor(5), context))
    torch.nn.init.normal_(with_map.where)
    assert not torch.equal(with_map(x, torch.tensor(5), context), without(x, torch.tensor(5), context))


def test_norms_add_to_the_variance_what_sds_networks_add() -> None:
    """1e-5 in residual blocks and at the end, 1e-6 before attention: seen where the variance is as small."""
    unet = UNet(UNetConfig((16, 16), (1, 0), 0, 16, res_blocks=1, heads=2, groups=4))
    x = 1e-3 * torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    layer, flat = unet.down[0].layers[0], x.view(2, 4, -1)
    for norm, eps in (
        (layer.res.norm1, 1e-5),
        (layer.res.norm2, 1e-5),
        (unet.norm_out, 1e-5),
        (layer.attn.norm, 1e-6),
    ):
        variance = flat.var(2, correction=0, keepdim=True)
        wanted = (flat - flat.mean(2, keepdim=True)) / (variance + eps).sqrt()
        torch.testing.assert_close(norm(x).view(2, 4, -1), wanted, atol=1e-5, rtol=1e-4)


def test_residual_branches_and_the_output_begin_at_zero() -> None:
    net = UNet(TINY)
    x, temb, words = torch.randn(2, 16, 8, 8), torch.randn(2, 64), torch.randn(2, 3, 12)
    assert torch.equal(net.down[0].layers[0](x, temb, words), x)
    assert not net(x[:, :4], torch.tensor(5), words).any()
