"""The UNet equals diffusers' with the same weights, in the layouts of SD 1.x, SD 2.x and SDXL."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from minireflect.checkpoints.files import load_into
from minireflect.checkpoints.names import DIFFUSERS_UNET
from minireflect.models.unet import Added, UNet, UNetConfig
from tests.models.test_unet import batch
from tests.small import shaken

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
