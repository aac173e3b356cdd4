"""The two scripts as a user meets them: one clear sentence and exit status 2 on bad input, nothing overwritten."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from minireflect.checkpoints.files import read_weights
from minireflect.methods.rlrig import RIG_PARTS as PARTS

ROOT = Path(__file__).parent.parent
TINY = ["--srrl.iterations", "1", "--srrl.prompts", "2", "--srrl.group", "2", "--srrl.steps", "3", "--sampler.steps", "3",
        "--evaluation.pictures", "8"]  # fmt: skip


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(script: str, *words: str, cwd: Path) -> Result:
    """The script's main() in this process, from a folder of its own: the import of torch is paid once."""
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # tyro reads the comments beside the fields from there
    spec.loader.exec_module(module)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *words])
        try:
            code = module.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return Result(code or 0, out.getvalue(), err.getvalue())


def refused(result: Result, *parts: str) -> None:
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    said = " ".join(result.stderr.replace("│", " ").split())  # tyro frames and wraps its sentences
    for part in parts:
        assert part in said, result.stderr


BAD_SAMPLES = {
    "an unknown word": (["a pink bal in still air"], ("'pink'", "'bal'", "nearest: ", "ball")),
    "an empty prompt": ([""], ("prompt is empty",)),
    "no prompt": ([], ("no prompt",)),
    "negative rounds": (["a red ball", "--rounds", "-1"], ("rounds -1",)),
    "no steps": (["a red ball", "--steps", "0"], ("steps 0",)),
    "too many steps": (["a red ball", "--steps", "1001"], ("1001", "1000")),
    "a missing folder": (["a red ball", "--out", "no/such/folder/x.png"], ("no folder",)),
    "no picture file": (["a red ball", "--out", "x.txt"], ("must end in",)),
    "missing weights": (["a red ball", "--weights", "nowhere"], ("no folder nowhere",)),
    "negative guidance": (["a red ball", "--guidance", "-2"], ("guidance",)),
    "an unknown relation": (["--method", "rlrig", "red ball under blue box"], ("relations are left of",)),
    "a contradiction": (
        ["--method", "rlrig", "red ball left of blue box; blue box left of red ball"],
        ("contradicts itself", "left of red ball", "left of blue box"),
    ),
    "too many things": (["--method", "rlrig", "four red balls; blue box"], ("5 things", "at most 4")),
    "a graph that no picture shows": (
        ["--method", "rlrig", "red ball inside blue box; green ball inside blue box"],
        ("no way was found",),
    ),
    "a missing annotation": (["--method", "rlrig", "nowhere.json"], ("cannot read nowhere.json",)),
}


@pytest.mark.parametrize("what", BAD_SAMPLES)
def test_bad_input_to_sample_is_one_sentence(tmp_path: Path, what: str) -> None:
    words, parts = BAD_SAMPLES[what]
    refused(run("sample.py", *words, cwd=tmp_path), *parts)
    assert list(tmp_path.iterdir()) == []


def test_broken_weight_files_are_named(tmp_path: Path) -> None:
    shipped = ROOT / "minireflect" / "pretrained"
    for part in shipped.glob("*.safetensors"):
        shutil.copy(part, tmp_path)
    whole = (tmp_path / "unet.safetensors").read_bytes()
    (tmp_path / "unet.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(
        run("sample.py", "a red ball", "--weights", ".", "--out", "x.png", cwd=tmp_path),
        "unet.safetensors",
        "truncated",
    )
    shutil.copy(tmp_path / "reward.safetensors", tmp_path / "unet.safetensors")
    refused(
        run("sample.py", "a red ball", "--weights", ".", "--out", "x.png", cwd=tmp_path), "not a UNetConfig"
    )
    assert not (tmp_path / "x.png").exists()


def test_sample_draws_a_strip_and_its_verdicts(tmp_path: Path) -> None:
    prompt = "a balance with a big red ball on the left pan and a small blue ball on the right pan"
    done = run("sample.py", prompt, "--rounds", "1", "--out", "strip.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "strip.png").stat().st_size > 5_000
    assert "round 0:" in done.stdout and "round 1:" in done.stdout and "reward" in done.stdout


def test_sample_check_compares_with_the_committed_picture(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "sample.py"), "--check"]  # once as a user starts it
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_train_leaves_a_run_and_refuses_to_spoil_it(tmp_path: Path) -> None:
    done = run("train.py", "--out", "run", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "run"
    assert "| held-out prompts | base | SRRL |" in done.stdout
    figures = {p.name for p in (folder / "figures").iterdir()}
    assert figures == {
        "reward_and_truth.png",
        "latents_by_round.png",
        "accuracy_by_law.png",
        "before_and_after.png",
        "rounds.png",
    }
    assert json.loads((folder / "config.json").read_text())["srrl"]["iterations"] == 1
    row = next(
        r
        for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if r["stage"] == "srrl"
    )
    for key in ("reward", "reward_se", "right", "clip_high", "clip_low", "kl", "grad_norm", "updates_total", "log_ratio",
                "flat_groups", "latent_mean", "latent_std", "first_ratio"):  # fmt: skip
        assert key in row
    assert row["first_ratio"] == 0.0
    drawn = run("sample.py", "a red ball", "--weights", "run", "--out", "x.png", "--steps", "3", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    refused(run("train.py", "--out", "run", *TINY, cwd=tmp_path), "already holds a run")
    refused(run("train.py", "--out", "run", "--resume", "--srrl.lr", "0.5", cwd=tmp_path), "srrl.lr was")
    refused(run("train.py", "--out", "run", "--resume", "--weights", "run", cwd=tmp_path), "weights was None")
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_rlrig_from_nothing_to_a_strip(tmp_path: Path) -> None:
    """Every line of the second system: `all --scenes graphs`, then `rlrig` from what that made, then a strip."""
    done = run("train.py", "all", "--scenes", "graphs", "--preset", "smoke", "--out", "all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = {p.stem for p in (tmp_path / "all" / "weights").iterdir()}
    assert weights == {*PARTS, "base_actor", "editor"}
    done = run("train.py", "rlrig", "--preset", "smoke", "--weights", "all", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in ("base", "best of", "repeated generation", "scripted Actor", "warmed-up Actor", "phase 1 + 2", "trained editor, silent"):  # fmt: skip
        assert row in done.stdout
    untrained = ["--rlrig.actor-iterations", "0", "--rlrig.editor-iterations", "0", "--rlrig.no-controls"]
    again = run("train.py", "rlrig", "--preset", "smoke", "--weights", "run", "--out", "again", *untrained, cwd=tmp_path)  # fmt: skip
    assert again.returncode == 0 and "phase 1 + 2" in again.stdout and "best of" not in again.stdout
    started = read_weights(tmp_path / "run" / "weights" / "base_actor.safetensors")  # as that run did
    ended = read_weights(tmp_path / "again" / "weights" / "actor.safetensors")
    assert all(torch.equal(started[k], ended[k]) for k in started)
    figures = {p.name for p in (tmp_path / "run" / "figures").iterdir()}
    assert figures == {"phases.png", "scores.png", "edits.png"}
    words = ["--method", "rlrig", "red ball on blue box", "--rounds", "1", "--steps", "4", "--weights", "run"]
    drawn = run("sample.py", *words, "--out", "strip.png", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr[-3000:]
    assert "a red ball on a blue box" in drawn.stdout and "drawn: " in drawn.stdout
    assert (tmp_path / "strip.png").stat().st_size > 5_000


def test_reasongen_from_nothing_to_pictures(tmp_path: Path) -> None:
    """Every line of the third system: the codebook, fine-tuning on rationales, reinforcement."""
    stages = {"vq": None, "captioner": "vq", "reason-sft": "captioner", "reason-grpo": "reason-sft"}
    for command, source in stages.items():
        words = [*(["--weights", source] if source else []), "--preset", "smoke", "--out", command]
        done = run("train.py", command, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        if command == "vq":
            assert "| as rendered | 1.000 | 1.000 | 1.000 | 0.0000 |" in done.stdout
    for row in ("| SFT |", "| SFT, best of 2 |", "| SFT, best of 4 |", "| SFT + GRPO |"):
        assert row in done.stdout
    assert {p.name for p in (tmp_path / command / "figures").iterdir()} == {"reason_grpo.png", "thoughts.png"}
    weights = {p.stem for p in (tmp_path / command / "weights").iterdir()}
    assert weights == {"base_reasongen", "reasongen", "vq", "autoencoder", "captioner"}
    drawn = run("sample.py", "--method", "reasongen", "--weights", "reason-grpo", "a tall red candle in still air", "--out", "s.png", cwd=tmp_path)  # fmt: skip
    assert drawn.returncode == 0 and "reward" in drawn.stdout and (tmp_path / "s.png").exists()
    odd = run("sample.py", "--method", "reasongen", "--weights", "reason-grpo", "a purple dragon", cwd=tmp_path)  # fmt: skip
    assert odd.returncode == 2 and "dragon" in odd.stderr and "Traceback" not in odd.stderr
    shipped = run("sample.py", "--method", "reasongen", "a tall red candle in still air", "--out", "t.png", cwd=tmp_path)  # fmt: skip
    assert (
        shipped.returncode == 0 and "flame" in shipped.stdout and (tmp_path / "t.png").stat().st_size > 5_000
    )
    rounds = run("sample.py", "--method", "reasongen", "--rounds", "3", "a tall red candle in still air", cwd=tmp_path)  # fmt: skip
    assert rounds.returncode == 2 and "draws once" in rounds.stderr
    bad = run("train.py", "reason-grpo", "--weights", "vq", "--out", "bad", cwd=tmp_path)
    assert bad.returncode == 2 and "reasongen.safetensors" in bad.stderr and "Traceback" not in bad.stderr


BAD_TRAININGS = {
    "resume from nowhere": (["--resume", "--out", "nowhere"], ("nowhere",)),
    "resume without a folder": (["--resume"], ("--out",)),
    "a group of one": (["--srrl.objective", "ppo"], ("ppo needs at least 2", "--srrl.group 4")),
    "too many steps": (["--srrl.steps", "2000"], ("2000", "1000")),
    "a share above one": (["--world.silent", "1.5"], ("silent",)),
    "missing weights": (["--weights", "nowhere"], ("there is no folder", "nowhere")),
    "an edit that goes too far": (["rlrig", "--rlrig.loop.t-star", "1.5"], ("t_star 1.5",)),
    "a group that cannot compare": (["rlrig", "--rlrig.group", "1"], ("group is 1", "at least 2")),
    "an unknown command": (["trian"], ("trian",)),
    "an unknown option": (["--srrl.lrr", "1"], ("lrr",)),
}


@pytest.mark.parametrize("what", BAD_TRAININGS)
def test_bad_input_to_train_is_one_sentence(tmp_path: Path, what: str) -> None:
    words, parts = BAD_TRAININGS[what]
    refused(run("train.py", *words, cwd=tmp_path), *parts)
    assert list(tmp_path.iterdir()) == []
