"""minireflect train: every stage leaves its run folder, nothing is overwritten, bad input is one sentence."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minireflect import stages
from minireflect.checkpoints.files import read_weights
from minireflect.cli.train import defaults, parse
from minireflect.config import changed, to_dict
from minireflect.methods.rlrig import RIG_PARTS as PARTS
from tests.cli.console import refused, run

TINY = [
    "--iterations",
    "1",
    "--prompts-per-iteration",
    "2",
    "--group",
    "2",
    "--steps",
    "3",
    "--sampler.steps",
    "3",
    "--evaluation.pictures",
    "4",
    "--updates",
    "2",
    "--batch",
    "8",
]


@pytest.mark.usefixtures("short_strips")
def test_train_leaves_a_run_and_refuses_to_spoil_it(tmp_path: Path) -> None:
    done = run("train", "--out", "run", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "run"
    assert "\ntest prompts  " in done.stdout
    assert (tmp_path / "run" / "table.md").read_text().startswith("| test prompts | base | SRRL |")
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
    for key in ("reward", "reward_se", "right", "clip_high", "clip_low", "kl", "grad_norm", "updates_total",
                "log_ratio",
                "flat_groups", "latent_mean", "latent_std", "first_ratio"):  # fmt: skip
        assert key in row
    assert row["first_ratio"] is None  # the default is no PPO: it has no ratio
    drawn = run("sample", "a red ball", "--weights", "run", "--out", "x.png", "--steps", "3", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    refused(run("train", "--out", "run", *TINY, cwd=tmp_path), "already holds a run")
    refused(run("train", "--out", "run", "--resume", "--lr", "0.5", cwd=tmp_path), "srrl.lr was")
    refused(run("train", "--out", "run", "--resume", "--weights", "run", cwd=tmp_path), "weights was None")
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_rlrig_from_nothing_to_a_strip(tmp_path: Path) -> None:
    """Every line of RL-RIG: `all --scenes graphs`, then `rlrig` from what that made, then a strip."""
    done = run("train", "all", "--scenes", "graphs", "--preset", "smoke", "--out", "all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = {p.stem for p in (tmp_path / "all" / "weights").iterdir()}
    assert weights == {*PARTS, "base_actor", "editor"}
    done = run("train", "rlrig", "--preset", "smoke", "--weights", "all", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in ("base ", "best of", "raw loop, warmed-up Actor", "phase 1 ", "phase 1 + 2"):
        assert row in done.stdout
    untrained = ["--actor-iterations", "0", "--editor-iterations", "0", "--no-controls"]
    again = run(
        "train", "rlrig", "--preset", "smoke", "--weights", "run", "--out", "again", *untrained, cwd=tmp_path
    )
    assert again.returncode == 0 and "phase 1 + 2" in again.stdout and "best of" not in again.stdout
    started = read_weights(tmp_path / "run" / "weights" / "base_actor.safetensors")  # as that run did
    ended = read_weights(tmp_path / "again" / "weights" / "actor.safetensors")
    assert all(torch.equal(started[k], ended[k]) for k in started)
    figures = {p.name for p in (tmp_path / "run" / "figures").iterdir()}
    assert figures == {"phases.png", "scores.png", "edits.png"}
    words = ["--method", "rlrig", "red ball on blue box", "--rounds", "1", "--steps", "4", "--weights", "run"]
    drawn = run("sample", *words, "--out", "strip.png", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr[-3000:]
    assert "a red ball on a blue box" in drawn.stdout and "round 0: " in drawn.stdout
    assert (tmp_path / "strip.png").stat().st_size > 5_000


@pytest.mark.slow
def test_reasongen_from_nothing_to_pictures(tmp_path: Path) -> None:
    """Every line of the third system: the codebook, fine-tuning on rationales, reinforcement."""
    stages = {"vq": None, "captioner": "vq", "reason-sft": "captioner", "reason-grpo": "reason-sft"}
    for command, source in stages.items():
        words = [*(["--weights", source] if source else []), "--preset", "smoke", "--out", command]
        done = run("train", command, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        if command == "vq":
            written = (tmp_path / "vq" / "table.md").read_text()
            assert "| as rendered | 1.000 | 1.000 | 1.000 | 0.0000 |" in written
    for row in ("SFT  ", "SFT, best of 2", "SFT, best of 4", "SFT + GRPO"):
        assert row in done.stdout
    assert {p.name for p in (tmp_path / command / "figures").iterdir()} == {"reason_grpo.png", "thoughts.png"}
    weights = {p.stem for p in (tmp_path / command / "weights").iterdir()}
    assert weights == {"base_reasongen", "reasongen", "vq", "autoencoder", "captioner"}
    drawn = run(
        "sample",
        "--method",
        "reasongen",
        "--weights",
        "reason-grpo",
        "a tall red candle in still air",
        "--out",
        "s.png",
        cwd=tmp_path,
    )
    assert drawn.returncode == 0 and "reward" in drawn.stdout and (tmp_path / "s.png").exists()
    odd = run("sample", "--method", "reasongen", "--weights", "reason-grpo", "a purple dragon", cwd=tmp_path)
    assert odd.returncode == 2 and "dragon" in odd.stderr and "Traceback" not in odd.stderr
    shipped = run(
        "sample", "--method", "reasongen", "a tall red candle in still air", "--out", "t.png", cwd=tmp_path
    )
    assert (
        shipped.returncode == 0 and "flame" in shipped.stdout and (tmp_path / "t.png").stat().st_size > 5_000
    )
    rounds = run(
        "sample", "--method", "reasongen", "--rounds", "3", "a tall red candle in still air", cwd=tmp_path
    )
    assert rounds.returncode == 2 and "--rounds has no effect here" in rounds.stderr
    bad = run("train", "reason-grpo", "--weights", "vq", "--out", "bad", cwd=tmp_path)
    assert bad.returncode == 2 and "reasongen.safetensors" in bad.stderr and "Traceback" not in bad.stderr


JPEG = ["--base", "x", "--reward", "incompressibility"]
BAD_TRAININGS = {
    "resume from nowhere": (["--resume", "--out", "nowhere"], ("nowhere",)),
    "resume without a folder": (["--resume"], ("--out",)),
    "a group of one": (
        ["--advantage", "group", "--rounds", "0"],
        ("a prompt or more, got one; try --group 4",),
    ),
    "too many steps": (["--steps", "2000"], ("2000", "1000")),
    "a share above one": (["--cooldown", "1.5"], ("cooldown",)),
    "missing weights": (["--weights", "nowhere"], ("there is no folder", "nowhere")),
    "an edit that goes too far": (
        ["rlrig", "--loop.t-star", "1.5"],
        ("train: t_star must be in [0, 1], got 1.5",),
    ),
    "a group that cannot compare": (["rlrig", "--group", "1"], ("group must be at least 2, got 1",)),
    "an empty folder name": (["--out", ""], ("--out needs the folder of a run",)),
    "to resume no folder": (["--resume", "--out", ""], ("--resume needs --out RUN",)),
    "PPO's clip without PPO": (["--clip-range", "0.5"], ("--clip-range has no effect with objective grpo",)),
    "PPO's ratio without PPO": (["--ratio", "guard"], ("ratio has no effect with objective grpo; use",)),
    "PPO's KL without PPO": (["--kl", "0.1"], ("kl has no effect with objective grpo; use objective ppo",)),
    "a replay that PPO has not": (
        ["--method", "ddpo", "--replay", "2"],
        ("--replay has no effect with objective ppo; leave it out",),
    ),
    "what regression does not read": (
        ["--objective", "regress", "--pull", "0.1", "--advantage", "group"],
        ("--advantage, --pull has no effect with objective regress",),
    ),
    "a clip of the editor": (
        ["rlrig", "--editor.clip-range", "0.5"],
        ("--editor.clip-range has no effect with objective regress",),
    ),
    "the noise of refused pictures, which blind rounds have not": (
        ["--mode", "blind", "--wrong", "fresh", "--redraw", "all"],
        ("--redraw, --wrong has no effect with --mode blind",),
    ),
    "CLIP for a reward that has none": (
        [*JPEG, "--clip", "PATH", "--clip-activation", "gelu"],
        ("--clip, --clip-activation has no effect with these rewards",),
    ),
    "another CLIP than that of the reward": (
        ["--base", "x", "--reward", "hps=PATH", "--clip", "PATH", "--clip-activation", "gelu"],
        ("--clip has no effect with these rewards",),
    ),
    "a weight that is not finite": (
        ["--base", "x", "--reward", "1e999*incompressibility"],
        ("the weight in --reward 1e999*incompressibility must be a finite number",),
    ),
    "weights that nothing starts from": (
        ["all", "--weights", "x"],
        ("--weights has no effect with random weights at the start; leave it out",),
    ),
    "an unknown command": (["trian"], ("trian", "the commands are srrl, all")),
    "an unknown option": (
        ["--stepz", "1"],
        ("no option '--stepz' (did you mean --steps?); minireflect train srrl --help lists",),
    ),
    "an option without a value": (["--steps"], ("--steps needs a whole number after it",)),
    "a word for a number": (["--lr=fast"], ("--lr must be a number, got 'fast'",)),
    "a broken number": (["--steps", "1.5"], ("--steps must be a whole number, got '1.5'",)),
    "no such choice": (["--objective", "x"], ("--objective must be one of grpo, regress, ppo, got 'x'",)),
    "no such preset": (["--preset", "big"], ("--preset must be one of cpu, gpu, smoke, got 'big'",)),
    "a wrong list": (["--suffixes", "1", "x"], ("--suffixes must be a list, each a whole number",)),
    "a value too many": (["--guidance", "1", "2"], ("'2' is not expected after --guidance;",)),
    "a value for a switch": (["rlrig", "--no-controls", "1"], ("'1' is not expected after --controls",)),
}


@pytest.mark.parametrize("what", BAD_TRAININGS)
def test_bad_input_to_train_is_one_sentence(tmp_path: Path, what: str) -> None:
    words, parts = BAD_TRAININGS[what]
    done = run("train", *words, cwd=tmp_path)
    refused(done, *parts)
    assert list(tmp_path.iterdir()) == [] and done.stderr.count("\n") == 1 and len(done.stderr) < 320


@pytest.mark.parametrize("objective", ["grpo", "regress", "ppo"])
@pytest.mark.parametrize("method", ["srrl", "paper", "ddpo", "grpo"])
@pytest.mark.parametrize("base", [[], ["--base", "x"]])
def test_every_recipe_may_have_another_objective(objective: str, method: str, base: list[str]) -> None:
    """The recipe's own options may have no effect, then."""
    words = ["--method", method, "--objective", objective, *base]
    assert parse(words, defaults("srrl", words)).srrl.objective == objective
    words = ["--preset", "smoke", "--editor.objective", objective]
    assert parse(words, defaults("rlrig", words)).rlrig.editor.objective == objective


def test_a_run_with_an_option_that_has_no_effect_can_be_resumed(tmp_path: Path) -> None:
    words = ["--method", "ddpo", *JPEG]
    config = changed(parse(words, defaults("srrl", words)), {"finetune": {"clip": "PATH"}})
    (tmp_path / "config.json").write_text(
        json.dumps(to_dict(changed(config, {"srrl": {"objective": "grpo"}})))
    )
    words = ["--resume", "--out", str(tmp_path)]
    assert parse(words, defaults(None, words)).srrl.clip_range == 1e-4


def test_a_run_of_a_checkpoint_that_also_names_weights_is_refused(tmp_path: Path) -> None:
    words = ["--base", "x"]
    config = to_dict(parse(words, defaults("srrl", words))) | {"weights": "y"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(
        run("train", "--resume", "--out", ".", cwd=tmp_path), "--weights", "cannot be combined with --base"
    )


def test_a_training_without_prompts_is_said(tmp_path: Path) -> None:
    words = ["--sampler.guidance", "0"]
    with pytest.warns(UserWarning, match="guidance 0 ignores the prompt"):
        parse(words, defaults("srrl", words))


@pytest.mark.parametrize("saved", [False, True])
def test_only_a_run_with_a_saved_state_is_said_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    def interrupted(task: stages.Task, *_: str) -> None:
        if saved:
            (task.run.folder / "state" / "srrl.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "do", interrupted)
    done = run("train", "--preset", "smoke", "--out", "run", cwd=tmp_path)
    more = "; continue the saved run with --resume --out run" if saved else ""
    assert (done.returncode, done.stderr) == (130, f"minireflect train: stopped{more}\n")


def test_a_log_without_its_package_is_refused_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(run("train", "--preset", "smoke", "--log", "wandb", cwd=tmp_path), "pip install wandb")
    assert not (tmp_path / "runs" / "srrl-1").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("short_strips")
@pytest.mark.parametrize("method", ["ddpo", "grpo"])
def test_a_run_is_labelled_with_its_method(tmp_path: Path, method: str) -> None:
    done = run("train", "srrl", "--method", method, "--preset", "smoke", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"runs/{method}-1" in done.stdout and method.upper() in done.stdout
    rows = (tmp_path / "runs" / f"{method}-1" / "metrics.jsonl").read_text()
    assert f'"model": "{method.upper()}"' in rows and "SRRL" not in rows
    steps = [r for r in map(json.loads, rows.splitlines()) if r["stage"] == "srrl"]
    assert steps and all(r["first_ratio"] == (0.0 if method == "ddpo" else None) for r in steps)


Finished = Callable[[str, Path], None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A function (command, folder) -> None: in folder/run is a finished run of the smoke preset, a copy of
    one that is made once.
    """
    made: dict[str, Path] = {}

    def copy(command: str, folder: Path) -> None:
        if command not in made:
            made[command] = tmp_path_factory.mktemp(command)
            done = run("train", command, "--preset", "smoke", "--out", "run", cwd=made[command])
            assert done.returncode == 0, done.stderr[-3000:]
        shutil.copytree(made[command] / "run", folder / "run")

    return copy


def test_resume_says_what_the_run_is(tmp_path: Path, finished: Finished) -> None:
    finished("vq", tmp_path)
    again = run("train", "--resume", "--out", "run", cwd=tmp_path)
    assert again.returncode == 0 and "smoke preset" in again.stdout and again.stdout.startswith("vq")
    refused(
        run("train", "vq", "--resume", "--out", "run", "--preset", "cpu", cwd=tmp_path), "preset was 'smoke'"
    )
    refused(run("train", "actor", "--resume", "--out", "run", cwd=tmp_path), "a run of vq, not of actor")


@pytest.mark.parametrize(
    "ruin", [Path.unlink, pytest.param(lambda path: os.truncate(path, 1_000), marks=pytest.mark.slow)]
)
def test_weights_that_were_deleted_or_cut_are_made_again_from_the_state(
    tmp_path: Path, ruin: Callable[[Path], None], finished: Finished
) -> None:
    finished("vq", tmp_path)
    kept = {
        p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.suffix in (".done", ".jsonl", ".md")
    }
    weights = tmp_path / "run" / "weights" / "vq.safetensors"
    before = {name: t.clone() for name, t in read_weights(weights).items()}
    ruin(weights)
    again = run("train", "--resume", "--out", "run", cwd=tmp_path)
    assert again.returncode == 0 and "'vq.safetensors' is missing or damaged in run/weights" in again.stderr
    after = read_weights(weights)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.read_bytes() == was for p, was in kept.items())
    assert "missing" not in run("train", "--resume", "--out", "run", cwd=tmp_path).stderr


@pytest.mark.slow
@pytest.mark.usefixtures("short_strips")
@pytest.mark.parametrize("lost", ["unet", "base_unet", "reward", "autoencoder"])
def test_every_stage_of_all_is_gone_through_again(tmp_path: Path, lost: str, finished: Finished) -> None:
    """The base is the diffusion model's again, not what reinforcement made of it."""
    finished("all", tmp_path)
    weights, metrics = tmp_path / "run" / "weights", (tmp_path / "run" / "metrics.jsonl").read_bytes()
    before = {p: read_weights(p) for p in weights.iterdir()}
    (weights / f"{lost}.safetensors").unlink()
    assert run("train", "--resume", "--out", "run", cwd=tmp_path).returncode == 0
    for path, tensors in before.items():
        after = read_weights(path)
        assert all(torch.equal(tensors[k], after[k]) for k in tensors), path
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
