"""The autoencoder has the published size, samples its latents as stated, and learns."""

from dataclasses import replace

import pytest
import torch

from minireflect import rng
from minireflect.models.autoencoder import (
    TOY_AUTOENCODER,
    Autoencoder,
    AutoencoderConfig,
    Quantiser,
    VQAutoencoder,
    VQConfig,
)
from tests.small import shaken, small_reasongen

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


def test_latents_are_the_scaled_means() -> None:
    torch.manual_seed(0)
    autoencoder = shaken(Autoencoder(TINY))
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(autoencoder.encode(images), 0.5 * autoencoder.moments(images)[0])


def test_latents_are_normalised_by_the_stated_mean_and_std() -> None:
    """(z - mean) / std * scaling_factor, per channel, as in diffusers; decoding takes it back."""
    mean, std = (0.1, -0.2, 0.3, 0.0), (1.0, 2.0, 0.5, 1.5)
    autoencoder = shaken(Autoencoder(replace(TINY, mean=mean, std=std)))
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z, latents = autoencoder.moments(images)[0], autoencoder.encode(images)
        for i in range(4):
            torch.testing.assert_close(latents[:, i], (z[:, i] - mean[i]) / std[i] * 0.5)
        plain = shaken(Autoencoder(TINY))
        plain.load_state_dict(autoencoder.state_dict())
        torch.testing.assert_close(autoencoder.decode(latents), plain.decode(0.5 * z))


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


# ----------------------------------------------------------------------------------------- pictures as codes
SMALL = VQConfig(width=8, groups=4, forms=32, colors=16, dimensions=4)


def quantiser() -> Quantiser:
    torch.manual_seed(0)
    return Quantiser(32, 4)


def test_a_code_becomes_the_nearest_word() -> None:
    """Against brute force over all distances in float64 (van den Oord's equation 2)."""
    q, z = quantiser(), torch.randn(3, 4, 5, 6, generator=rng(0, "z"))
    found = q(z)
    unit = torch.nn.functional.normalize(z, dim=1).permute(0, 2, 3, 1).double()  # (b h w d)
    distances = torch.cdist(unit.reshape(-1, 4), q.codebook.double())  # (b*h*w k)
    assert torch.equal(found.ids.flatten(), distances.argmin(1))
    nearest = q.codebook[found.ids].permute(0, 3, 1, 2)
    torch.testing.assert_close(found.vectors, nearest, atol=1e-6, rtol=0)
    wanted = 1.25 * distances.amin(1).square().mean() / 4  # beta 0.25; a mean over dimensions
    torch.testing.assert_close(found.loss.double(), wanted, atol=1e-6, rtol=0)


def test_words_come_back_as_themselves() -> None:
    """Codebook round trip: every word is its own nearest."""
    q = quantiser()
    ids = torch.randperm(32, generator=rng(0, "ids")).view(1, 4, 8)
    assert torch.equal(q(q.vectors(ids)).ids, ids)


def test_the_gradient_passes_straight_through() -> None:
    """With equal directions d loss / d codes is that of the words; each term of the loss moves its own side
    alone.
    """
    q = quantiser()
    z = torch.nn.functional.normalize(torch.randn(2, 4, 3, 3, generator=rng(0, "z")), dim=1).requires_grad_()
    found = q(z)
    weight = torch.randn(found.vectors.shape, generator=rng(0, "w"))
    (grad,) = torch.autograd.grad((weight * found.vectors).sum(), z, retain_graph=True)
    tangent = weight - (weight * z).sum(1, keepdim=True) * z  # of the normalisation, at vectors of length 1
    torch.testing.assert_close(grad, tangent.detach(), atol=1e-5, rtol=0)
    to_words = torch.autograd.grad(found.vectors.sum(), q.words.weight, retain_graph=True, allow_unused=True)
    assert to_words == (None,)  # the decoder's gradient does not reach the codebook; L_vq's does
    entries = q.codebook[found.ids].permute(0, 3, 1, 2)
    unit = torch.nn.functional.normalize(z, dim=1)
    wanted = torch.autograd.grad(((entries - unit.detach()) ** 2).mean(), q.words.weight, retain_graph=True)
    wanted += torch.autograd.grad(0.25 * ((unit - entries.detach()) ** 2).mean(), z)  # van den Oord (3)
    torch.testing.assert_close(torch.autograd.grad(found.loss, (q.words.weight, z)), wanted)


def test_unused_words_move_to_what_is_badly_served_and_used_ones_stay() -> None:
    q, z = quantiser(), torch.randn(4, 4, 8, 8, generator=rng(0, "z")).abs()
    with torch.no_grad():
        q.words.weight[5:20] = -q.words.weight[5:20].abs()  # on the far side of all codes
    used = torch.bincount(q(z).ids.flatten(), minlength=32)
    before, error = q.codebook.clone(), q(z).loss.item()
    moved = q.revive(z, used, rng(0, "revive"))
    assert moved == int((used == 0).sum()) >= 15
    assert torch.equal(q.codebook[used > 0], before[used > 0])
    assert q(z).loss.item() < error
    assert q.revive(z, torch.ones(32), rng(0, "revive")) == 0
    far = torch.cat([q.codebook[:1].expand(200, 4), -q.codebook[:1]]).T.reshape(1, 4, 201, 1)
    with torch.no_grad():
        q.words.weight.copy_(q.words.weight[:1].expand(32, 4))
    q.revive(far.contiguous(), torch.arange(32), rng(0, "revive"))
    assert (q.codebook[0] @ q.codebook[1]).item() == pytest.approx(-1, abs=0.01)  # onto the one that is far


def test_a_word_depends_on_its_patch_alone() -> None:
    """Whatever stands around it, the same 8x8 pixels are the same word; and a changed pixel changes this word
    at most.
    """
    torch.manual_seed(0)
    vq, chance = VQAutoencoder(SMALL), rng(0, "pictures")
    one, other = torch.rand(2, 1, 3, 64, 64, generator=chance) * 2 - 1
    other[..., 24:32, 16:24] = one[..., 24:32, 16:24]
    assert vq.encode(one)[0, 3, 2] == vq.encode(other)[0, 3, 2]
    for encoder in (vq.see_form, vq.see_color):
        codes = [encoder(x) for x in (one, other)]  # (1 d 8 8)
        torch.testing.assert_close(codes[0][..., 3, 2], codes[1][..., 3, 2], atol=1e-5, rtol=0)
        assert ((codes[0] - codes[1]).abs().amax(1)[0] > 1e-3).sum() == 63  # and everywhere else they differ
        shifted = torch.cat([one[..., 8:], one[..., :8]], -1)  # by one patch
        torch.testing.assert_close(encoder(shifted), codes[0].roll(-1, -1), atol=1e-5, rtol=0)


def test_a_picture_is_its_own_colours_and_its_twins_forms() -> None:
    """What training makes of a picture and a twin is what the codebooks make of the form of the one and the
    colours of the other.
    """
    torch.manual_seed(0)
    vq = VQAutoencoder(SMALL).eval()
    images, twins = torch.rand(2, 3, 3, 64, 64, generator=rng(0, "pictures")) * 2 - 1
    out, form, color = vq(images, twins)
    assert torch.equal(form.ids, vq.encode(twins) // 16)
    assert torch.equal(color.ids, vq.encode(images) % 16)
    torch.testing.assert_close(out, vq.decode(form.ids * 16 + color.ids), atol=1e-6, rtol=0)
    assert torch.equal(form.encodings, vq.see_form(twins)) and form.encodings.shape == (3, 4, 8, 8)
    assert torch.equal(color.encodings, vq.see_color(images))


def test_a_picture_of_codes_that_is_not_finite_is_an_error() -> None:
    codec = small_reasongen().codec
    with torch.no_grad():
        [*codec.autoencoder.parameters()][-1].fill_(torch.inf)  # clamped it would look like a picture
    with pytest.raises(FloatingPointError, match="a picture is not a finite number"):
        codec.pictures(torch.zeros(1, 16, dtype=torch.long))


def test_log_variances_stay_within_the_bounds_of_latent_diffusion() -> None:
    net = Autoencoder(TINY)
    with torch.no_grad():
        net.quant_conv.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 99.0, -99.0, 99.0, -99.0]))
        _, logvar = net.moments(torch.zeros(1, 3, 16, 16))
    assert logvar.amax((0, 2, 3)).tolist() == logvar.amin((0, 2, 3)).tolist() == [20.0, -30.0] * 2


def test_an_entry_is_revived_far_from_the_nearest_entry() -> None:
    """Nearest, and not on average: beside an entry, whose opposite is another entry, nothing is far."""
    q = Quantiser(3, 2)
    with torch.no_grad():
        q.words.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
    z = torch.tensor([[1.0, 0.0]] * 200 + [[0.0, -1.0]]).T.reshape(1, 2, 201, 1)
    assert q.revive(z, torch.tensor([3, 0, 2]), rng(0, "revive")) == 1
    assert q.codebook[1].tolist() == pytest.approx([0.0, -1.0], abs=0.1)
