"""What TensorBoard's own reader finds in its files is what metrics.jsonl says."""

import json
import sys
from pathlib import Path

import pytest
import torch

from minireflect.run import Run
from minireflect.tracking import PICTURES_EVERY, Tracking, numbers


def test_tensorboard_reads_the_values_of_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path / "run", {})
    run.tracking = Tracking("tensorboard", run.folder)
    for step in range(PICTURES_EVERY + 2):
        run.log("srrl", step, reward=step / 10, right=None, reward_by_round=[step, step + 0.5], note="words")
        run.show("srrl", step, torch.linspace(-1, 1, 3 * 3 * 4 * 4).view(3, 3, 4, 4))
    run.log("evaluation", 0, model="base", score={"physical": {"accuracy": 0.25}})
    read = EventAccumulator(str(run.folder / "tensorboard"))
    read.Reload()
    rows = run.metrics("srrl")
    assert [(e.step, round(e.value, 6)) for e in read.Scalars("srrl/reward")] == [
        (r["step"], r["reward"]) for r in rows
    ]
    assert [e.value for e in read.Scalars("srrl/reward_by_round/1")] == [
        r["reward_by_round"][1] for r in rows
    ]
    assert [e.value for e in read.Scalars("evaluation/score/physical/accuracy")] == [0.25]
    assert not {"srrl/right", "srrl/note", "evaluation/model"} & {*read.Tags()["scalars"]}
    pictures = read.Images("srrl/pictures")
    assert [p.step for p in pictures] == [0, PICTURES_EVERY] and pictures[0].width == 3 * 4


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        Tracking("wandb", tmp_path)


def test_wandb_gets_the_same_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which has the two functions that are called."""
    seen: list = []

    class WandB:
        log = staticmethod(seen.append)

        @staticmethod
        def init(**how: str) -> type:
            seen.append(how)
            return WandB

    monkeypatch.setitem(sys.modules, "wandb", WandB)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = Run(tmp_path / "run", {})
    run.tracking = Tracking("wandb", run.folder)
    run.log("srrl", 3, reward=0.5, by_round=[1, 2])
    assert seen[0]["mode"] == "offline" and seen[0]["dir"] == str(run.folder)
    assert seen[1] == {"srrl/reward": 0.5, "srrl/by_round/0": 1.0, "srrl/by_round/1": 2.0, "srrl/step": 3}
    assert json.loads((run.folder / "metrics.jsonl").read_text())["reward"] == 0.5


def test_numbers_have_their_path() -> None:
    assert numbers({"a": 1, "b": {"c": [2.5, None]}, "d": "x"}, "s") == [("s/a", 1.0), ("s/b/c/0", 2.5)]
