"""The autoencoder's training: the error falls, the latents get a std of 1, and a decoder can be trained
further.
"""

from pathlib import Path

import pytest
import torch

from minireflect.models.autoencoder import Autoencoder, AutoencoderConfig
from minireflect.pretrain.autoencoder import AutoencoderTraining, train_autoencoder
from minireflect.run import Job, Run
from minireflect.streams import choices
from minireflect.world.canvas import to_tensor
from minireflect.world.data import WorldConfig, training_pairs

TINY = AutoencoderConfig(channels=(8, 8, 8, 8), res_blocks=1, groups=4)


def test_the_error_falls_and_latents_have_a_std_of_1(tmp_path: Path) -> None:
    pixels, _, _ = training_pairs(16, WorldConfig(), choices(0, "pictures"))
    config, job = AutoencoderTraining(steps=60, batch=4, lr=4e-3), Job(Run(tmp_path / "run", {}))
    model = train_autoencoder(config, TINY, pixels, job)
    rows = job.run.metrics("autoencoder")
    assert len(rows) == 60 and rows[-1]["mse"] < 0.3 * rows[0]["mse"]
    assert model.encode(to_tensor(pixels)).std().item() == pytest.approx(1, abs=1e-4)


def test_from_a_start_only_the_decoder_learns(tmp_path: Path) -> None:
    pixels, _, _ = training_pairs(8, WorldConfig(), choices(0, "pictures"))
    torch.manual_seed(5)
    start = Autoencoder(AutoencoderConfig(channels=(8, 8, 8, 8), res_blocks=1, groups=4, scaling_factor=0.5))
    config, job = AutoencoderTraining(steps=2, batch=4, noise=0.5), Job(Run(tmp_path / "run", {}))
    model = train_autoencoder(config, TINY, pixels, job, start)
    images = to_tensor(pixels)
    torch.testing.assert_close(model.encode(images), start.encode(images), atol=1e-5, rtol=0)
    assert model.config == start.config
    before, after = start.decoder.state_dict(), model.decoder.state_dict()
    assert not all(torch.equal(before[key], after[key]) for key in before)
