"""From a folder to a LoRA: the lines of docs/checkpoints.md on a tiny checkpoint, and a reward in a file."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.console import ROOT, run
from tests.parity.checkpoints import WORDS, taught, trainable

pytestmark = pytest.mark.usefixtures("no_network")

PAGE = (ROOT / "docs" / "checkpoints.md").read_text().split("## From a folder to a LoRA in ten lines")[1]
REWARD, LINES = (re.search(rf"```{kind}\n(.*?)```", PAGE, re.S)[1] for kind in ("python", "bash"))
# A base of 8 x 8 latents learns in fewer and larger steps than the recipes have.
SHORT = ["--device", "cpu", "--steps", "4", "--sampler.steps", "4", "--guidance", "1"]
SHORT += ["--sampler.guidance", "1", "--micro-batch", "64", "--prompts-per-iteration", "2"]
SHORT += ["--evaluation.pictures", "64"]
MORE = [
    "--iterations",
    "12",
    "--lora.rank",
    "8",
    "--lora.targets",
    *["q", "k", "v", "out", "ff.up", "ff.down"],
]
FORWARD = ["--batch", "128", "--lr", "3e-2", "--pull", "0.01", "--group", "16"]
LEARNING = {
    "ddpo": ["--lr", "1e-2", "--clip-range", "3e-2", "--group", "16"],
    "grpo": [*FORWARD, "--updates", "1"],
    "srrl": [*FORWARD, "--updates", "2", "--replay", "1", "--iterations", "18"],  # two rounds of each
}


def make(folder: Path) -> Path:
    """What the page takes to be there: BASE, prompts.txt and mymodule.py."""
    trainable(folder, 0.0, 16).rename(folder / "BASE")
    (folder / "mymodule.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("\n".join(WORDS[:2]) + "\n")
    return folder


def do(line: str, folder: Path, *more: str) -> str:
    """A line of the page, in the folder.  -> what it prints"""
    program, *words = shlex.split(line)
    assert program == "minireflect", line
    done = run(*words, *more, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def evaluations(run: Path) -> list[dict]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["score"] for row in rows if row["stage"] == "evaluation"]


@pytest.mark.slow
def test_the_ten_lines(tmp_path: Path) -> None:
    """All of them: with each method the reward rises by more than four standard errors, on the same 64
    noises before and after; then one table and figure of the three, pictures, and diffusers.
    """
    folder = make(tmp_path)
    taught(folder / "BASE")
    (folder / "evaluation_metadata.jsonl").write_text(json.dumps({"prompt": "a cat", "tag": "single_object"}))
    trained = [line for line in LINES.splitlines() if " train " in line]
    for line in trained:
        method = line.split("--method ")[1].split()[0]
        do(line, folder, *SHORT, *MORE, *LEARNING[method])
        first, last = evaluations(folder / method)
        error = (first["reward_se"] ** 2 + last["reward_se"] ** 2) ** 0.5
        assert last["reward"] > first["reward"] + 4 * error, method
    assert len(trained) == len(LEARNING)
    for line in [line for line in LINES.splitlines() if line not in trained]:
        program, *words = shlex.split(line)
        if program == "minireflect":
            do(line, folder, *(["--steps", "2", "--device", "cpu"] if words[0] == "sample" else []))
            continue
        words = [sys.executable, *placed(words)]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "seeds.py" not in line or all(m.upper() in done.stdout for m in LEARNING), done.stdout
    made = ("before.png", "after.png", "half.png", "methods.png", "geneval/00000/samples/0003.png")
    assert not [name for name in made if not (folder / name).is_file()]


def placed(words: list[str]) -> list[str]:
    """Our scripts lie in the checkout, and the page is read there."""
    return [str(ROOT / word) if word.startswith("scripts/") else word for word in words]


@pytest.mark.slow
def test_pictures_and_lora_are_saved_on_the_way(tmp_path: Path) -> None:
    """What `--every` saves is the LoRA of that time, and the training is the same without it."""
    folder = make(tmp_path)
    line = "minireflect train --base BASE --reward mymodule:brightness --prompts prompts.txt --method grpo"
    short = [*SHORT, "--group", "2", "--updates", "1", "--batch", "4", "--cooldown", "0"]
    short += ["--evaluation.pictures", "2"]
    do(line, folder, *short, "--iterations", "3", "--every", "2", "--out", "with")
    do(line, folder, *short, "--iterations", "3", "--out", "without")
    do(line, folder, *short, "--iterations", "2", "--out", "two")
    weights = {p.stem: load_file(p) for p in (folder / "with" / "weights").glob("lora*")}
    assert weights.keys() == {"lora", "lora_2"}
    last, at_2 = weights["lora"], weights["lora_2"]
    plain, two = (load_file(folder / out / "weights" / "lora.safetensors") for out in ("without", "two"))
    assert any(not torch.equal(last[n], at_2[n]) for n in last)
    assert all(torch.equal(last[n], plain[n]) and torch.equal(at_2[n], two[n]) for n in last)
    assert [p.name for p in (folder / "with" / "figures").glob("samples*")] == ["samples_2.png"]
    assert not list((folder / "without" / "figures").glob("samples*"))
