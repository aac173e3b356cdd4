"""Smoke runs give the numbers in tests/golden.json: a change that should change nothing shows here.

    python -m tests.test_golden          writes tests/golden.json anew; say in the commit why numbers moved

On one machine the numbers are equal bit for bit; other processors round differently, hence the tolerance.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from minireflect import load_pipeline, load_reward, rng
from minireflect.checkpoints.files import read_weights
from minireflect.run import read_metrics
from minireflect.world.prompts import prompt_set
from tests.cli.console import run

pytestmark = pytest.mark.usefixtures("short_strips")
GOLDEN = Path(__file__).parent / "golden.json"
RUNS = {
    "all": ["all"],
    "ppo": ["srrl", "--objective", "ppo", "--group", "2"],
    "blind": ["srrl", "--mode", "blind", "--rounds", "1"],
    "rlrig": ["rlrig"],
    "vq": ["vq"],
    "sft": ["reason-sft"],
    "grpo": ["reason-grpo"],
}


def numbers(folder: Path, words: list[str]) -> dict[str, float]:
    """Every number that a smoke run logs, by stage, step and name."""
    result = run("train", *words, "--preset", "smoke", "--device", "cpu", "--out", "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    return logged(folder / "run")


def logged(folder: Path) -> dict[str, float]:
    return {
        f"{row['stage']} {row['step']} {name}": value
        for row in read_metrics(folder)
        for name, value in row.items()
        if isinstance(value, float)
    }


@torch.no_grad()
def pictures() -> dict[str, float]:
    """Mean and spread of pictures of the shipped model: plain, guided, with a reward."""
    pipe, texts = load_pipeline(), [p.text for p in prompt_set("unconventional", "test")[:4]]
    made = {
        "plain": pipe.generate(texts, generator=rng(0, "golden")),
        "guided": pipe.generate(texts, guidance=3.0, eta=0.0, generator=rng(0, "golden")),
        "selected": pipe.generate(texts, rounds=3, reward=load_reward(), generator=rng(0, "golden")),
    }
    return {f"{name} {i}": v for name, x in made.items() for i, v in enumerate(x.mean((1, 2, 3)).tolist())}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "all"])
def test_a_smoke_run_gives_the_numbers_it_gave(tmp_path: Path, name: str) -> None:
    as_it_was(name, numbers(tmp_path, RUNS[name]))


@pytest.mark.slow
def test_the_stages_of_all_can_be_run_one_by_one(tmp_path: Path) -> None:
    """Each run hands on what the next stage needs; nothing else than `--weights` is said."""
    source: list[str] = []
    for command in ("autoencoder", "diffusion", "reward", "srrl"):
        (tmp_path / command).mkdir()
        numbers(tmp_path / command, [command, *source])
        source = ["--weights", str(tmp_path / command / "run")]
    as_it_was("all", numbers(tmp_path, RUNS["all"]))
    one_by_one, together = (
        read_weights(f / "run/weights/unet.safetensors") for f in (tmp_path / "srrl", tmp_path)
    )
    assert all(torch.equal(one_by_one[k], together[k]) for k in together)


def as_it_was(name: str, found: dict[str, float]) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    assert found.keys() == golden.keys()
    assert found == pytest.approx(golden, rel=2e-2, abs=2e-3)


def test_the_shipped_model_samples_the_pictures_it_sampled() -> None:
    assert pictures() == pytest.approx(json.loads(GOLDEN.read_text())["pictures"], abs=5e-3)


if __name__ == "__main__":
    written = {"pictures": pictures()}
    for run_name, command in RUNS.items():
        with tempfile.TemporaryDirectory() as place:
            written[run_name] = numbers(Path(place), command)
    rounded = {name: {k: float(f"{v:.6g}") for k, v in part.items()} for name, part in written.items()}
    GOLDEN.write_text(json.dumps(rounded, indent=0) + "\n")
