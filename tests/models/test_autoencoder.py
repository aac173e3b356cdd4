"""The autoencoder has the published size, samples its latents as stated, and learns."""

import pytest
import torch

from minireflect.models.autoencoder import TOY_AUTOENCODER, Autoencoder, AutoencoderConfig
from tests.small import shaken

TINY = AutoencoderConfig(channels=(8, 16, 16), res_blocks=2, groups=4, scaling_factor=0.5)
SD = AutoencoderConfig(channels=(128, 256, 512, 512), scaling_factor=0.18215)  # 1 / std of SD's latents


@pytest.mark.parametrize(
    "config, parameters, tensors",
    [(TOY_AUTOENCODER, 2_725_623, 188), (SD, 83_653_863, 248)],
    ids=["toy", "sd"],
)
def test_published_sizes(config: AutoencoderConfig, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        autoencoder = Autoencoder(config)
    assert sum(p.numel() for p in autoencoder.parameters()) == parameters
    assert len(autoencoder.state_dict()) == tensors


def test_toy_takes_pictures_of_64_to_latents_of_8() -> None:
    autoencoder = Autoencoder(TOY_AUTOENCODER)
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
