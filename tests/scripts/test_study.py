"""The study's costs are counted, not believed: every way of drawing against a UNet that counts the pictures
it sees.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from minireflect import load_pipeline, rng
from minireflect.cli.train import defaults, parse
from minireflect.evaluate import EvaluationConfig, Score
from minireflect.evaluate_reason import another_of_its_kind, evaluation_prompts
from minireflect.models.reasongen import SamplingConfig
from minireflect.pipeline import ReasonPipeline
from minireflect.world.prompts import TASKS
from tests.small import small_reasongen

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import reason_study
import reports
import rig_study
import study


@pytest.mark.parametrize("name", study.WAYS | study.MORE_WAYS)
def test_costs_are_what_the_network_and_the_reward_see(name: str) -> None:
    pipe, seen = load_pipeline(), {"unet": 0, "rewards": 0}

    def unet(x: torch.Tensor, *_: object) -> torch.Tensor:
        seen["unet"] += len(x)
        return torch.zeros_like(x)

    def counted(images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        seen["rewards"] += len(images)
        return torch.zeros(len(images))  # nothing pleases, so that every way does all its rounds

    pipe.unet.forward = unet
    row = study.measure(pipe, counted, (study.WAYS | study.MORE_WAYS)[name], 0, pictures=1)
    assert row["unet"] == seen["unet"] / 2  # pictures: one physical, one unconventional
    assert row["rewards"] == seen["rewards"] / 2 - 1  # one more for the table, which is not the way's own


def test_the_table_gives_mean_and_interval_over_seeds() -> None:
    score = dict.fromkeys(("reward", "unreadable", "diversity", "edges", "brightness"), 0.5)
    rows = [
        {"arm": "base", "way": "one picture", "seed": i, "unet": 20.0, "rewards": 0.0}
        | {kind: {**score, "accuracy": a} for kind in study.KINDS}
        for i, a in enumerate((0.5, 0.6, 0.7))
    ]
    table = study.table(rows)
    last = table.markdown.splitlines()[-1]
    assert last.startswith("| base · one picture | 0.600 ± 0.248 | 0.600 ± 0.248 |")  # 4.303 * 0.1 / sqrt(3)
    assert last.endswith("| 20 | 0 | 0 | 0 | 0 |")


def test_finished_runs_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(reports.subprocess, "run", lambda words, check: asked.append(words))
    reports.train("srrl", tmp_path / "new", ["--rounds", "0"])
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    reports.train("srrl", tmp_path / "begun", ["--rounds", "0"])
    (tmp_path / "done" / "state").mkdir(parents=True)
    (tmp_path / "done" / "state" / "srrl.done").write_text("")
    assert reports.train("srrl", tmp_path / "done", []) == tmp_path / "done"
    assert [("--resume" in w, "--rounds" in w) for w in asked] == [(False, True), (True, False)]


def test_differences_are_taken_seed_by_seed() -> None:
    """The seeds differ by much, the arms always by 0.1: the interval of the difference is nothing, not that
    of the arms.
    """
    rows = [
        {"arm": arm, "way": "one picture", "seed": i}
        | {kind: {"accuracy": a + ahead} for kind in study.KINDS}
        for arm, ahead in (("SRRL", 0.1), ("regression", 0.0))
        for i, a in enumerate((0.2, 0.5, 0.8))
    ]
    assert study.paired(rows).markdown.splitlines()[2:] == [
        "| SRRL − regression | 0.100 ± 0.000 | 0.100 ± 0.000 | 0.100 ± 0.000 |"
    ]


def test_right_pictures_are_binned_by_the_base(tmp_path: Path) -> None:
    """Prompts at 0, 0.1 and 0.9 in bins of their own; seeds give the interval; an empty bin has no row."""
    before = {"a": 0.0, "b": 0.1, "d": 0.9}
    after = {"SRRL": [{"a": 0.2, "b": 0.4, "d": 1.0}, {"a": 0.4, "b": 0.4, "d": 1.0}]}
    lines = study.by_success(before, after, tmp_path / "bins.png").markdown.splitlines()[2:]
    assert lines[0] == "| 0 to 0.05 | 1 | 0.000 | 0.300 ± 1.271 |"  # 12.706 * 0.1414 / sqrt(2)
    assert lines[2] == "| 0.5 to 1 | 1 | 0.900 | 1.000 ± 0.000 |" and (tmp_path / "bins.png").exists()


def test_equal_cost_compares_where_the_cheaper_arm_ends() -> None:
    logs = {
        arm: [
            [
                {"right_by_round": [i / 10, 0.0], "reward_calls": calls * (i + 1)}
                | {"unet_evaluations": 100 * (i + 1)}
                for i in range(6)
            ]
        ]
        for arm, calls in (("SRRL", 20), ("cheap", 10))
    }
    text = study.at_equal_cost(logs, window=2).markdown
    # iterations 1 and 2 of SRRL by calls, 4 and 5 of the other; 4 and 5 of both by evaluations
    assert "| cheap | 60 | 0.150 | 0.450 | 600 | 0.450 | 0.450 |" in text


@pytest.mark.slow
def test_the_study_of_reasongen_measures_every_row_on_the_run_that_it_belongs_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seeds of invented scores: every arm finds its run, means and paired differences are right."""
    asked, drawn, swapped = [], [], []

    def trained(words: list[str], check: bool) -> None:
        folder = Path(words[words.index("--out") + 1])
        asked.append((folder.name, words))
        (folder / "state").mkdir(parents=True)
        (folder / "state" / f"{words[2]}.done").write_text("")
        step = {"stage": "reason-grpo", "step": 0, "reward": 0.5, "right": 0.4, "text_entropy": 0.2}
        (folder / "metrics.jsonl").write_text(json.dumps({**step, "image_entropy": 1.0}) + "\n")

    def invented(pipe: list[Path], judge: object, config: EvaluationConfig, arm: str, **options) -> Score:
        run = pipe[0].parent.name
        drawn.append((arm, run, config, options))
        value = 0.3 + 0.2 * (config.seed - 1_000) + (0.1 if run.startswith("grpo-true") else 0.0)
        tasks = dict.fromkeys([*TASKS, "overall"], value)
        keys = ("physical", "unconventional", "accepted", "fooled", "unreadable", "planned", "kept")
        values = dict(zip(keys, (value, value, value, 0.1, 0.1, value, value)))
        return {"geneval": tasks, **values, "tokens": 87.0, "parts": {"heat": (1.0, 0.5, 0.25)}}

    monkeypatch.setattr(reports.subprocess, "run", trained)
    monkeypatch.setattr(reason_study, "load_reasongen", lambda weights: [weights])
    monkeypatch.setattr(reason_study, "freed", lambda base, folder: base)
    monkeypatch.setattr(reason_study, "reward_beside", lambda weights: None)
    monkeypatch.setattr(reason_study.Swapped, "_make", lambda pipe: swapped.extend(pipe) or pipe)
    monkeypatch.setattr(reason_study, "evaluate_reason", invented)
    words = [
        "reason_study.py",
        "--out",
        str(tmp_path / "out"),
        "--docs",
        str(tmp_path / "docs"),
        "--seeds",
        "0",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", words)
    reason_study.main()
    assert len(asked) == 3 + 2 * (len(reason_study.RATIONALES) + len(reason_study.REINFORCED)) + len(
        reason_study.STRAINED
    )
    starts = {name: w[w.index("--weights") + 1] for name, w in asked if "--weights" in w}
    assert [starts[name].split("/")[-1] for name in ("base", "base-2")] == ["captioner", "base"]
    assert starts["grpo-freed-1"].endswith("base-2") and starts["sft-true-1"].endswith("base-2")
    assert starts["grpo-none-1"].endswith("sft-none-1") and starts["grpo-steady-0"].endswith("sft-true-0")
    page = (tmp_path / "docs" / "reasongen_study.md").read_text()
    assert page.count("| no rationale | 0.400 ± 1.271 |") == 1  # 12.706 * 0.1414 / sqrt(2)
    assert "| no rationale | 0.100 ± 0.000 | 0.100 ± 0.000 | 0.100 ± 0.000 |" in page
    assert {p.name for p in (tmp_path / "docs").iterdir()} == {
        "reasongen_study.md",
        "reasongen_arms.png",
        "reasongen_entropy.png",
    }
    assert "| no rationale, temperature 0.2 | 0.100 ± 0.000 | 0.100 ± 0.000 | 0.100 ± 0.000 |" in page
    assert {arm for arm, *_, o in drawn if "sampling" in o and o["sampling"].temperature == 0.2} == {
        arm for arm in reason_study.ARMS if "0.2" in arm
    }
    assert [weights.parent.name for weights in swapped] == ["grpo-true-0", "grpo-true-1"]
    assert {(arm, r) for arm, r, c, o in drawn if o.get("best_of") == 4 and c.seed == 1_001} == {
        ("no rationale, best of 4", "sft-none-1"), ("rationale, best of 4", "sft-true-1")
    }  # fmt: skip
    asked.clear(), drawn.clear()
    reason_study.main() and not asked and not drawn  # what is finished is not done again


def test_swapped_rationales_are_anothers_of_the_same_law(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = evaluation_prompts(EvaluationConfig(pictures=16))
    seen, plain = [], ReasonPipeline.sample

    def spy(self, texts, sampling, generator, words=None):
        drawn = plain(self, texts, sampling, generator, words)
        seen.append((words, drawn.rationale))
        return drawn

    monkeypatch.setattr(ReasonPipeline, "sample", spy)
    swapped = reason_study.Swapped._make(small_reasongen())
    swapped.sample([p.text for p in prompts], SamplingConfig(), rng(0, "swap"))
    (nothing, written), (given, drawn) = seen
    assert nothing is None and torch.equal(drawn, given)
    assert torch.equal(given, written[another_of_its_kind(prompts)])


def test_every_option_of_the_studies_is_one_of_the_command_line() -> None:
    s, r = study, reason_study
    arms = [("srrl", options) for options in s.ARMS.values()]
    arms += [("rlrig", [*rig_study.SHORT, "--group", "2", "--graphs", "4", "--evaluation.seed", "1"])]
    arms += [("reason-sft", options) for options in ([*r.START, *r.AGAIN], r.TUNING)]
    reinforced = [*(options for _, options in r.REINFORCED.values()), *r.STRAINED.values()]
    arms += [("reason-grpo", [*r.REINFORCING, *options]) for options in reinforced]
    for command, options in arms:
        words = [*options, "--preset", "cpu"]
        parse(words, defaults(command, words))  # exits on an unknown one
