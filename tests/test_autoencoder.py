"""The autoencoder: equal to diffusers' from the same weights, of the published size, and able to learn."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from minireflect.checkpoints.files import load_into
from minireflect.checkpoints.names import DIFFUSERS_AUTOENCODER
from minireflect.models.autoencoder import Autoencoder, AutoencoderConfig

TINY = AutoencoderConfig(channels=(8, 16, 16), res_blocks=2, groups=4, scaling_factor=0.5)


def shaken(module: nn.Module) -> nn.Module:
    """Noise on every parameter, so that no norm is the identity and no branch is silent."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


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


@pytest.mark.parametrize(
    "config, parameters, tensors",
    [(AutoencoderConfig.toy(), 2_725_623, 188), (AutoencoderConfig.sd(), 83_653_863, 248)],
    ids=["toy", "sd"],
)
def test_published_sizes(config: AutoencoderConfig, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        autoencoder = Autoencoder(config)
    assert sum(p.numel() for p in autoencoder.parameters()) == parameters
    assert len(autoencoder.state_dict()) == tensors


def test_toy_takes_pictures_of_64_to_latents_of_8() -> None:
    autoencoder = Autoencoder(AutoencoderConfig.toy())
    latents = autoencoder.encode(torch.zeros(1, 3, 64, 64))
    assert latents.shape == (1, 4, 8, 8)
    assert autoencoder.decode(latents).shape == (1, 3, 64, 64)


def test_sampled_latents_have_the_stated_moments() -> None:
    torch.manual_seed(0)
    autoencoder = shaken(Autoencoder(TINY))
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    state = torch.get_rng_state()
    with torch.no_grad():
        mean, logvar = autoencoder.moments(images)
        assert torch.equal(autoencoder.encode(images), 0.5 * mean)
        many = images.expand(500, -1, -1, -1)
        samples = autoencoder.encode(many, torch.Generator().manual_seed(1))
        again = autoencoder.encode(many, torch.Generator().manual_seed(1))
    assert torch.equal(samples, again)
    assert torch.equal(state, torch.get_rng_state())  # the global stream is not touched
    std = 0.5 * (logvar / 2).exp()
    z = (samples.mean(0) - 0.5 * mean[0]) / (std[0] / 500**0.5)
    assert z.abs().max() < 5  # 64 standard normal numbers: one beyond 5 has odds of 4 in 100,000
    assert ((samples.std(0) / std[0]) - 1).abs().max() < 0.16  # its own error is 1/sqrt(2 * 500) = 0.03


def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(channels=(8, 16), res_blocks=1, groups=4))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=3e-3, fused=True)
    losses = []
    for _ in range(50):
        loss = (autoencoder.decode(autoencoder.encode(images)) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 50


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="18 x 16 are not a multiple of 4"):
        Autoencoder(TINY).encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match="channels 10 is not a multiple of groups 4"):
        AutoencoderConfig(channels=(10,), groups=4)
