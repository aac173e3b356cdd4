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
from minireflect.run import read_metrics
from minireflect.world.prompts import prompt_set
from tests.cli.console import run

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
    return {
        f"{row['stage']} {row['step']} {name}": value
        for row in read_metrics(folder / "run")
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
@pytest.mark.parametrize("name", RUNS)
def test_a_smoke_run_gives_the_numbers_it_gave(tmp_path: Path, name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    found = numbers(tmp_path, RUNS[name])
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
