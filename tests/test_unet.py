"""The UNet: equal to diffusers' from the same weights, of the published sizes, and able to learn."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from minireflect import rng
from minireflect.checkpoints.files import load_into
from minireflect.checkpoints.names import DIFFUSERS_UNET
from minireflect.models.blocks import timestep_embedding
from minireflect.models.unet import Added, UNet, UNetConfig

TINY = UNetConfig(
    channels=(16, 32), depths=(1, 1), mid_depth=1, context_width=12, res_blocks=1, heads=2, groups=4
)


def shaken(module: nn.Module) -> nn.Module:
    """Noise on every parameter, so that no norm is the identity and no branch is silent."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def batch(config: UNetConfig, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, config.in_channels, size, size)
    return x, torch.tensor([0, 371, 999]), torch.randn(3, 5, config.context_width)


SD1_LIKE = dict(
    block_out_channels=(32, 64, 64),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=2,
    attention_head_dim=4,  # the number of heads, despite its name
    cross_attention_dim=24,
    norm_num_groups=8,
)
SD2_LIKE = {**SD1_LIKE, "attention_head_dim": (2, 4, 4), "use_linear_projection": True}
SDXL_LIKE = dict(
    block_out_channels=(32, 64, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=2,
    attention_head_dim=(2, 4, 4),
    transformer_layers_per_block=(1, 2, 3),
    cross_attention_dim=24,
    use_linear_projection=True,
    norm_num_groups=8,
    addition_embed_type="text_time",
    addition_time_embed_dim=10,
    projection_class_embeddings_input_dim=20 + 6 * 10,
)
OURS = dict(channels=(32, 64, 64), context_width=24, groups=8)
CASES = {
    "sd1": (SD1_LIKE, UNetConfig(**OURS, depths=(1, 1, 0), mid_depth=1, heads=4)),
    "sd2": (
        SD2_LIKE,
        UNetConfig(**OURS, depths=(1, 1, 0), mid_depth=1, head_width=16, use_linear_projection=True),
    ),
    "sdxl": (
        SDXL_LIKE,
        UNetConfig(
            **OURS,
            depths=(0, 2, 3),
            mid_depth=3,
            head_width=16,
            use_linear_projection=True,
            pooled_width=20,
            size_width=10,
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(case: str) -> None:
    theirs_config, config = CASES[case]
    torch.manual_seed(0)
    theirs = shaken(UNet2DConditionModel(**theirs_config)).eval()
    ours = UNet(config)
    load_into(ours, theirs.state_dict(), DIFFUSERS_UNET)
    x, t, context = batch(config)
    added, kwargs = None, None
    if config.pooled_width is not None:
        added = Added(torch.randn(3, 20), torch.randint(0, 1024, (3, 6)))
        kwargs = {"text_embeds": added.pooled, "time_ids": added.sizes}
    with torch.no_grad():
        expected = theirs(x, t, context, added_cond_kwargs=kwargs).sample
        found = ours(x, t, context, added)
        one_time = ours(x, torch.tensor(371), context, added)
    assert expected.std() > 0.1  # the comparison is not between two zeros
    # Both are float32 of order 1 through some 40 layers; 1e-5 is about 80 units in the last place.
    assert (found - expected).abs().max() < 1e-5
    assert torch.allclose(one_time[1], found[1], atol=1e-6)


@pytest.mark.parametrize(
    "config, parameters, tensors",
    [
        (UNetConfig.toy(), 2_209_540, 260),
        (UNetConfig.sd15(), 859_520_964, 686),
        (UNetConfig.sd21(), 865_910_724, 686),
        (UNetConfig.sdxl(), 2_567_463_684, 1_680),
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
    config = CASES["sdxl"][1]
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
    with pytest.raises(ValueError, match="heads or head_width"):
        UNetConfig(channels=(32,), depths=(1,), mid_depth=1, context_width=8)


def test_pixels_can_be_told_where_they_are() -> None:
    """`side` adds one learned map behind the first convolution, zero at the start: the same network until it is trained."""
    plain, told = UNet(UNetConfig.small()), UNet(replace(UNetConfig.small(), side=None))
    assert plain.where.shape == (32, 8, 8) and not plain.where.any()
    missing = plain.load_state_dict(told.state_dict(), strict=False).missing_keys
    assert missing == ["where"]
    x, context = torch.randn(2, 4, 8, 8, generator=rng(0, "x")), torch.randn(2, 3, 64, generator=rng(0, "c"))
    torch.nn.init.normal_(plain.conv_out.weight), told.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(x, torch.tensor(5), context), told(x, torch.tensor(5), context))
    torch.nn.init.normal_(plain.where)
    assert not torch.equal(plain(x, torch.tensor(5), context), told(x, torch.tensor(5), context))
