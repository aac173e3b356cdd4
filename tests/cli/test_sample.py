"""minireflect sample: bad input is one sentence, and every method writes its picture and its verdicts."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from minireflect.__main__ import main
from minireflect.checkpoints.ours import SHIPPED
from minireflect.cli import sample
from minireflect.config import preset, to_dict
from minireflect.pipeline import SamplerConfig
from tests.cli.console import ROOT, refused, run
from tests.small import Stopped, stop

BASE = ["--base", "x", "a red ball"]
BAD_SAMPLES = {
    "an unknown word": (["a pink bal in still air"], ("'pink'", "'bal'", "nearest: ", "ball")),
    "an empty prompt": ([""], ("prompt is empty",)),
    "a prompt without a word": (["a red ball", "\N{BALLOON}, -"], ("contains no words",)),
    "no prompt": ([], ("no prompt",)),
    "an empty base, as of a variable that is not set": (["a red ball", "--base", ""], ("model_index.json",)),
    "negative rounds": (["a red ball", "--rounds", "-1"], ("rounds", "-1")),
    "no steps": (["a red ball", "--steps", "0"], ("steps", "got 0")),
    "too many steps": (["a red ball", "--steps", "1001"], ("1001", "1000")),
    "a missing folder": (["a red ball", "--out", "no/such/folder/x.png"], ("no folder",)),
    "no picture file": (["a red ball", "--out", "x.txt"], ("must end in",)),
    "missing weights": (["a red ball", "--weights", "nowhere"], ("no folder nowhere",)),
    "negative guidance": (["a red ball", "--guidance", "-2"], ("guidance",)),
    "an unknown relation": (["--method", "rlrig", "red ball under blue box"], ("relations are left of",)),
    "a contradiction": (
        ["--method", "rlrig", "red ball left of blue box; blue box left of red ball"],
        ("contradict each other", "left of red ball", "left of blue box"),
    ),
    "too many things": (["--method", "rlrig", "four red balls; blue box"], ("5 things", "at most 4")),
    "a graph that no picture shows": (
        ["--method", "rlrig", "red ball inside blue box; green ball inside blue box"],
        ("no layout was found",),
    ),
    "steps of a model that has none": (
        ["a red ball", "--method", "reasongen", "--steps", "9"],
        ("--steps has no effect here", "--method srrl or --method rlrig or --base PATH"),
    ),
    "step noise of RL-RIG, which has its own": (
        ["red ball on blue box", "--method", "rlrig", "--eta", "0.5"],
        ("--eta has no effect", "srrl"),
    ),
    "an adapter without a checkpoint": (
        ["a red ball", "--lora", "x"],
        ("--lora has no effect", "--base PATH"),
    ),
    "a method of ours for a checkpoint": (
        ["a red ball", "--base", "x", "--method", "rlrig"],
        ("--method has",),
    ),
    "a check with other weights": (["--check", "--weights", "X", "--seed", "5"], ("--check", "no prompt or")),
    "a check of a prompt": (["--check", "a red ball"], ("--check",)),
    "blind rounds that are none": (["a red ball", "--blind"], ("--blind has no effect without --rounds 1",)),
    "a guidance of blind rounds": (
        ["a red ball", "--rounds", "1", "--w-renoise", "0.5"],
        ("--w-renoise has no effect without --blind; leave it out",),
    ),
    "a guidance of no rounds": (
        [*BASE, "--w-denoise", "2"],
        ("--w-denoise has no effect without --rounds 1 or more",),
    ),
    "a number of pictures without a folder": (
        [*BASE, "--each", "7", "--out", "a.png"],
        ("--each has no effect without --out FOLDER",),
    ),
    "a scale of no adapter": ([*BASE, "--lora-scale", "0.5"], ("--lora-scale has no effect without --lora",)),
    "a negative prompt that is not read": (
        [*BASE, "--negative", "blurry", "--guidance", "1"],
        ("--negative has no effect with guidance 1",),
    ),
    "no folder": ([*BASE, "--out", ""], ("must end in", "folder")),
    "the current folder": ([*BASE, "--out", "./"], ("must end in", "folder")),
    **{
        f"a missing file of prompts, {name}": ([*BASE[:2], name, "--out", "folder"], (name, "check its path"))
        for name in ("no.jsonl", "no.csv", "a b.JSON", "x/no.tsv", "no.txt")
    },
    "a missing annotation": (["--method", "rlrig", "nowhere.json"], ("nowhere.json does not exist",)),
}


@pytest.mark.parametrize("what", BAD_SAMPLES)
def test_bad_input_to_sample_is_one_sentence(tmp_path: Path, what: str) -> None:
    words, parts = BAD_SAMPLES[what]
    refused(run("sample", *words, cwd=tmp_path), *parts)
    assert list(tmp_path.iterdir()) == []


def test_broken_weight_files_are_named(tmp_path: Path) -> None:
    shipped = ROOT / "minireflect" / "pretrained"
    for part in shipped.glob("*.safetensors"):
        shutil.copy(part, tmp_path)
    whole = (tmp_path / "unet.safetensors").read_bytes()
    (tmp_path / "unet.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(
        run("sample", "a red ball", "--weights", ".", "--out", "x.png", cwd=tmp_path),
        "unet.safetensors",
        "truncated",
    )
    shutil.copy(tmp_path / "reward.safetensors", tmp_path / "unet.safetensors")
    done = run("sample", "a red ball", "--weights", ".", "--out", "x.png", cwd=tmp_path)
    refused(done, "does not hold a UNetConfig")
    assert not (tmp_path / "x.png").exists()


def test_sample_draws_a_strip_and_its_verdicts(tmp_path: Path) -> None:
    prompt = "a balance with a big red ball on the left pan and a small blue ball on the right pan"
    done = run("sample", prompt, "--rounds", "1", "--out", "strip.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "strip.png").stat().st_size > 5_000
    assert "round 0:" in done.stdout and "round 1:" in done.stdout and "reward" in done.stdout


@pytest.mark.parametrize("inside", ["", "weights"])
def test_a_run_is_sampled_as_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    """Steps, guidance and step noise are those of its configuration, unless the user gives others."""
    run_folder, seen = tmp_path / "run", []
    measured = replace(preset("smoke"), sampler=SamplerConfig(7, 1.75, 0.25))
    shutil.copytree(SHIPPED, run_folder / "weights", ignore=shutil.ignore_patterns("r*g", "*.png"))
    (run_folder / "config.json").write_text(json.dumps(to_dict(measured)))
    monkeypatch.setattr(sample.showcase, "sampled_rounds", lambda *given: seen.append(given[2]) or stop())
    of_run = ["sample", "a red ball", "--weights", str(run_folder / inside)]
    others = [*of_run, "--steps", "9"], [*of_run, "--guidance", "2", "--eta", "0"], ["sample", "a red ball"]
    for words in (of_run, *others):
        with pytest.raises(Stopped):
            run(*words, cwd=tmp_path)
    assert [astuple(how) for how in seen] == [(7, 1.75, 0.25), (9, 1.75, 0.25), (7, 2, 0), (20, 1, 1)]


@pytest.mark.parametrize("words", [["--guidance", "0"], ["--method", "reasongen", "--guidance", "0"]])
def test_a_guidance_that_ignores_the_prompt_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    for way in sample.WAYS:
        monkeypatch.setitem(sample.WAYS, way, lambda *_: ([], []))
    with pytest.warns(UserWarning, match="guidance 0 ignores the prompt"):
        assert run("sample", "a red ball", *words, cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_sample_check_compares_with_the_committed_picture(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "sample.py"), "--check"]  # once as a user starts it
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_terminal_without_unicode_ends_no_command() -> None:
    words = [sys.executable, "-m", "minireflect", "--\N{BULLET}"]
    old = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, cwd=ROOT, env=os.environ | old, capture_output=True, timeout=300)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert b"there is no command '--" in done.stderr and done.stderr.isascii()


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.pdf"])
def test_a_full_disk_leaves_no_part_of_a_picture(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"the picture before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
        done = run("sample", "a tall red candle in still air", "--steps", "2", "--out", name, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(done, "file too large")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"the picture before"


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "long"])
def test_a_place_where_no_picture_can_be_is_refused_before_anything_is_sampled(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sample.WAYS, "srrl", stop)
    path = tmp_path / ("x.png" if kind != "long" else "x" * 300 + ".png")
    make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(path)}
    make.get(kind, int)()
    refused(run("sample", "a red ball", "--out", str(path), cwd=tmp_path), "cannot use")


@pytest.mark.parametrize("words", [["--help"], ["sample", "--help"], ["train", "srrl", "--help-all"]])
def test_a_reader_that_has_read_enough_ends_a_command_quietly(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `minireflect --help | head -1`, what is left in buffers at the end included; a process where it is
    quick.
    """
    reader, writer = os.pipe()
    os.close(reader)
    if words == ["--help"]:
        code = [sys.executable, "-m", "minireflect", *words]
        done = subprocess.run(code, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=300)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b"")
        return
    with open(writer, "w") as out, open(tmp_path / "stderr", "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        status = main(words)
    assert status == 141 and not (tmp_path / "stderr").read_text()


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_terminated_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    kept = signal.getsignal(number)
    try:
        monkeypatch.setitem(sample.WAYS, "srrl", lambda *_: os.kill(os.getpid(), number) or stop())
        done = run("sample", "a red ball", cwd=tmp_path)
    finally:
        signal.signal(number, kept)
    assert done.returncode == 130 and done.stderr == "minireflect sample: stopped\n"


def test_ctrl_c_before_the_command_is_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("raise KeyboardInterrupt")
    words = [sys.executable, "-m", "minireflect", "sample", "a red ball"]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "minireflect: stopped\n")


def test_a_long_command_is_cut(tmp_path: Path) -> None:
    done = run("x" * 10_000, cwd=tmp_path)
    refused(done, "there is no command 'xxx")
    assert len(done.stderr) < 320
