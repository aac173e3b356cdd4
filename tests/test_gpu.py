"""`benchmarks/gpu.py` works the first time that a card is at hand: here in tiny sizes on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import PARTS, main
from minireflect.__main__ import main as cli
from minireflect.cli import TRAINED
from minireflect.models.lora import LoRAConfig, add_lora
from minireflect.streams import rng
from tests.device import FarDevice
from tests.small import small_pipeline

RARE = [pytest.param(part, marks=pytest.mark.rare) for part in ("device", "all")]
TINY = ["--tiny", "--device", "cpu", "--out"]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["rl", *RARE])
def test_a_part_runs_and_is_not_done_again(part: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "gpu.jsonl"
    (line,) = main([part, *TINY, str(out)])
    assert not line["error"] and line["rows"] and json.loads(out.read_text()) == line
    if part == "device":
        values = {k: v for row in line["rows"] for k, v in row.items()}
        assert values["noise is the CPU's"] == 1 and values["first ratio - 1, exactly 0"] == 0
        assert values["largest difference of a metric from the CPU's"] == 0
    assert main([part, *TINY, str(out)]) == [line] and len(out.read_text().splitlines()) == 1
    assert f"{part}: " in capsys.readouterr().out


def test_a_part_that_fails_is_told_and_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(place: object):
        yield {"first": 1.0}
        raise RuntimeError("no memory")

    monkeypatch.setitem(PARTS, "rl", fails)
    out = tmp_path / "gpu.jsonl"
    for number in (1, 2):
        line = main(["rl", *TINY, str(out)])[-1]
        assert "no memory" in line["error"] and line["rows"] == [{"first": 1.0}]
        assert len(out.read_text().splitlines()) == number


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> FarDevice:
    """A pretended GPU, and of `torch.cuda` what the script calls."""
    for name, value in {"max_memory_allocated": 2e9, "get_device_name": "pretended"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    with FarDevice() as device:
        yield device


@pytest.mark.slow
@pytest.mark.parametrize("part", ["device", "train", "sd15"])
def test_a_part_on_a_pretended_gpu(
    part: str, far: FarDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line of the parts that train in this process; tensors of two devices never meet, and no generator
    of the CPU draws on the device.
    """
    monkeypatch.setattr("benchmarks.gpu.train", lambda *words, **how: tmp_path)  # a process of its own
    monkeypatch.setattr("benchmarks.gpu.read_metrics", lambda folder: [{"reward": 0.5}])
    (line,) = main([part, "--tiny", "--device", "cuda", "--out", str(tmp_path / "gpu.jsonl")])
    assert not line["error"] and line["rows"] and line["card"] == "pretended" and far.waits
    if part == "sd15":
        assert {row["peak GB"] for row in line["rows"] if "LoRA" in row} == {2.0}


@pytest.mark.rare
@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in TRAINED if c != "all"])
def test_a_command_on_a_pretended_gpu(command: str, far: FarDevice, tmp_path: Path) -> None:
    words = ["train", command, "--preset", "smoke", "--device", "cuda", "--out", str(tmp_path / "run")]
    assert cli(words) in (0, None) and far.waits


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_unet_with_lora_compiles_without_a_break(checkpointing: bool) -> None:
    """One graph for `torch.compile`, whatever the backend; the hooks of LoRA are in it."""
    unet = add_lora(small_pipeline().unet, LoRAConfig(rank=2), rng(0, "lora"))
    unet.checkpointing = checkpointing
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([3, 500]), torch.randn(2, 7, 16)
    found = torch.compile(unet, backend="eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(found, unet(*inputs))
    found.sum().backward()
