"""The autoencoder equals diffusers' with the same weights, under today's names and the old ones."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from minireflect.checkpoints.files import load_into
from minireflect.checkpoints.names import DIFFUSERS_AUTOENCODER
from minireflect.models.autoencoder import Autoencoder
from tests.models.test_autoencoder import TINY
from tests.small import shaken


@pytest.mark.parametrize("mid_attention", [True, False])
def test_equals_diffusers(mid_attention: bool) -> None:
    torch.manual_seed(0)
    theirs = AutoencoderKL(
        block_out_channels=TINY.channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=TINY.res_blocks,
        norm_num_groups=TINY.groups,
        mid_block_add_attention=mid_attention,
    )
    theirs = shaken(theirs).eval()
    ours = Autoencoder(replace(TINY, mid_attention=mid_attention))
    load_into(ours, theirs.state_dict(), DIFFUSERS_AUTOENCODER)
    images = torch.rand(2, 3, 24, 16) * 2 - 1
    with torch.no_grad():
        mean, logvar = ours.moments(images)
        expected = theirs.encode(images).latent_dist
        decoded = ours.decode(0.5 * expected.mean)  # ours takes scaled latents, theirs unscaled
        expected_decoded = theirs.decode(expected.mean).sample
    assert mean.shape == (2, 4, 6, 4) and expected.mean.std() > 0.1 and expected_decoded.std() > 0.1
    # Both are float32 of order 1; 1e-5 is about 80 units in the last place.
    assert (mean - expected.mean).abs().max() < 1e-5
    assert (logvar - expected.logvar).abs().max() < 1e-5
    assert (decoded - expected_decoded).abs().max() < 1e-5


def test_reads_the_old_names_of_the_attention() -> None:
    """Stable Diffusion 1.5's own file was written before diffusers renamed its attention."""
    ours = Autoencoder(TINY)
    theirs = AutoencoderKL(
        block_out_channels=TINY.channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=4,
    )
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        for new_word, old_word in old.items():
            name = name.replace(f".{new_word}.", f".{old_word}.")
        tensors[name] = tensor
    assert "encoder.mid_block.attentions.0.query.weight" in tensors
    load_into(ours, tensors, DIFFUSERS_AUTOENCODER)
    attn = theirs.decoder.mid_block.attentions[0]
    assert torch.equal(ours.decoder.mid.layers[0].attn.self_attn.v.weight, attn.to_v.weight)
