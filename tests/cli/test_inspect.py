"""minireflect inspect: a picture's reading, or why there is none; what is in a weight file."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minireflect import caption, sample_scene
from minireflect.checkpoints.ours import SHIPPED
from minireflect.world.canvas import write_picture
from minireflect.world.laws import render_pixels
from tests.cli.console import ROOT, refused, run


def test_a_picture_is_read(tmp_path: Path) -> None:
    scene = sample_scene(seed=3)
    write_picture(render_pixels(scene), tmp_path / "a.png")
    write_picture(np.zeros((64, 64, 3), np.uint8), tmp_path / "b.png")
    done = run("inspect", "a.png", "b.png", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[0] == f"a.png: {caption(scene)}"
    assert "b.png: unreadable: " in done.stdout


def test_pictures_side_by_side_are_read_one_by_one() -> None:
    done = run("inspect", str(SHIPPED / "check.png"), cwd=SHIPPED)
    assert "8 pictures" in done.stdout and len(done.stdout.splitlines()) == 9


def test_weights_are_described() -> None:
    done = run("inspect", "unet.safetensors", cwd=SHIPPED)
    assert done.returncode == 0 and "unet.safetensors: UNet of minireflect" in done.stdout
    assert "2,209,540 parameters" in done.stdout and "all matched" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "there is no path"), (["nowhere.safetensors"], "nowhere"), (["nowhere.png"], "nowhere.png")],
)
def test_bad_input_is_one_sentence(tmp_path: Path, words: list[str], said: str) -> None:
    refused(run("inspect", *words, cwd=tmp_path), said)


def test_another_size_is_named(tmp_path: Path) -> None:
    write_picture(np.zeros((30, 40, 3), np.uint8), tmp_path / "a.png")
    refused(run("inspect", "a.png", cwd=tmp_path), "40 x 30 pixels", "64 x 64")


def test_what_is_no_picture_is_named_at_once(tmp_path: Path) -> None:
    """A pipe would be waited for, and a device has no end."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for path in sorted(tmp_path.iterdir()):
        refused(run("inspect", path.name, cwd=tmp_path), f"{path.name} does not exist or is not a file")
    write_picture(np.zeros((64, 64, 3), np.uint8), tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    for name, found in {"cut.jpg": whole[:400], "empty.png": b"", "text.jpg": b"a picture"}.items():
        (tmp_path / name).write_bytes(found)
        refused(run("inspect", name, cwd=tmp_path), f"{name} is not a picture that can be read")


@pytest.mark.slow
def test_a_warning_is_a_note_of_one_line(tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_proj_in.lora_"
    matrices = {f"{layer}down.weight": torch.ones(2, 4), f"{layer}up.weight": torch.ones(4, 2)}
    save_file(matrices, tmp_path / "lora.safetensors", {"ss_clip_skip": "2"})
    words = [sys.executable, "-m", "minireflect", "inspect", "lora.safetensors"]
    said = "asks for ss_clip_skip '2', which is not applied; give --clip-skip, this number minus 1\n"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert (
        subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=env).stderr
        == f"note: lora.safetensors {said}"
    )
