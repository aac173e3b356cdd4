"""What the stages share: weights handed on, scores measured once, finished stages left alone."""

from pathlib import Path

import pytest
import torch

from minireflect import stages
from minireflect.checkpoints.ours import REASON, RIG, SHIPPED
from minireflect.cli import TRAINED
from minireflect.config import Config
from minireflect.methods.reasongen import ReasonRLConfig
from minireflect.models.tokenizer import PromptError
from minireflect.run import Run
from tests.cli.console import refused, run
from tests.small import Stopped, stop


def task(folder: Path, source: Path = SHIPPED, config: Config = Config()) -> stages.Task:
    run = Run(folder, {}, (folder / "config.json").exists())
    return stages.Task(config, run, source, torch.device("cpu"))


def test_a_model_is_measured_once(tmp_path: Path) -> None:
    calls = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"right": 0.5}

    first = task(tmp_path).measured("base", measure)
    again = task(tmp_path).measured("base", measure)  # as after a resume
    assert first == again == {"right": 0.5} and len(calls) == 1
    by_kind = task(tmp_path).measured("SRRL", lambda: {"physical": {"right": 1.0}})
    again = task(tmp_path).measured("SRRL", measure)
    assert again == by_kind == {"physical": {"right": 1.0}} and len(calls) == 1


def test_weights_are_handed_on_once_and_never_overwritten(tmp_path: Path) -> None:
    here = task(tmp_path)
    here.hand_on("reward", "nothing_of_this_name", unet="base_unet")
    assert {p.name for p in here.weights.iterdir()} == {"reward.safetensors", "base_unet.safetensors"}
    (here.weights / "reward.safetensors").write_text("trained")
    here.hand_on("reward")
    assert (here.weights / "reward.safetensors").read_text() == "trained"


def test_a_finished_stage_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr(
        stages, "STAGES", {"a": lambda task: done.append("a"), "b": lambda task: done.append("b")}
    )
    stages.do(task(tmp_path), "a")
    stages.do(task(tmp_path), "a", "b")
    assert done == ["a", "b"]


def test_the_judge_has_a_seed_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures and first weights are not the Checker's: what fools one need not fool the other."""
    told: list[tuple[str, int]] = []
    noted = lambda config, name, pipe, job: told.append((name, job.seed)) or stop()  # noqa: E731
    monkeypatch.setattr(stages, "train_checker", noted)
    for name in ("checker", "judge"):
        with pytest.raises(Stopped):
            stages.checker(task(tmp_path / name, RIG), name)
    assert told == [("checker", Config().seed), ("judge", Config().seed + 1)]


def test_every_attempt_of_an_iteration_asks_other_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, ...]] = []

    def noted(config, pipe, rewards, prompts, *_) -> None:
        told.extend(tuple(prompts(8, step, number)) for step in (0, 1) for number in range(4))
        stop()

    monkeypatch.setattr(stages, "train_reason_grpo", noted)
    monkeypatch.setattr(stages, "evaluate_reason", lambda *_: {"right": 0.5})
    grpo = ReasonRLConfig(controls=False, recall=0.0, read_rationales=False)
    with pytest.raises(Stopped):
        stages.reason_grpo(task(tmp_path / "run", REASON, Config("reason-grpo", grpo=grpo)))
    assert len({*told}) == 8


def test_every_command_has_its_stages() -> None:
    for scenes in ("laws", "graphs"):
        for command in TRAINED:
            assert set(Config(command, scenes=scenes).stages) <= set(stages.STAGES)


@pytest.mark.parametrize(
    "command", [c for c in TRAINED if c not in ("all", "autoencoder", "captioner", "vq")]
)
def test_missing_weights_are_named_and_leave_no_folder(tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    words = [command, "--weights", "empty", "--preset", "smoke"]
    refused(run("train", *words, cwd=tmp_path), str(tmp_path / "empty"), ".safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_world_with_new_words_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "all_texts", lambda: ["a red ball on a slope"])
    with pytest.raises(PromptError, match="slope"):
        stages.do(task(tmp_path), "srrl")
    assert not (tmp_path / "metrics.jsonl").exists()
