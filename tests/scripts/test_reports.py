"""What studies share, the page of RL-RIG's study, and the table over seeds: from numbers made by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import reports
import rig_checker
import rig_study
import seeds

ARMS = [
    {
        arm: dict.fromkeys(rig_study.COLUMNS, 0.1 * s + lead)
        for arm, lead in (("base", 0.2), ("phase 1", 0.3), ("phase 1 + 2", 0.4))
    }
    for s in range(3)
]


def test_means_and_differences_are_taken_over_seeds() -> None:
    """The seeds differ, one arm is always ahead by 0.2: its difference has no spread."""
    assert reports.means("arm", ARMS, {"met": "met"}).rows["base"] == {"met": "0.300 ± 0.248"}
    ahead = reports.differences("minus", ARMS, {"row": ("phase 1 + 2", "base")}, {"met": "met"})
    assert ahead.rows == {"row": {"met": "0.200 ± 0.000"}}


def test_bars_of_arms_show_every_arm_with_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """An arm that the first seed lacks is there; ends are cut off at 0; one seed has no interval."""
    drawn = []
    monkeypatch.setattr(reports.figures, "bars", lambda path, xlabel, plots: drawn.append(plots))
    seeds = [{"one": {"met": 0.1}}, {"one": {"met": 0.5}, "late": {"met": 0.9}}]
    reports.arms_figure(seeds, {"met": "met"}, Path("x.png"), "met")
    assert list(drawn[0]["met"][""]) == ["late", "one"]
    assert drawn[0]["met"][""]["late"] == (0.9, 0.9, 0.9)
    assert drawn[0]["met"][""]["one"] == pytest.approx((0.3, 0.0, 1.0))  # 12.706 * 0.283 / sqrt(2) a side


def test_a_result_is_made_once(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        found = reports.once(tmp_path / "rows" / "x.json", lambda: made.append(1) or {"a": 1.5})
        assert found == {"a": 1.5}
    assert made == [1]


def test_the_page_of_the_study_of_rlrig(tmp_path: Path) -> None:
    answers = {
        name: {
            "probability": [0.1, 0.9, 0.6, 0.4],
            "truth": [False, True, True, True],
            "kind": ["on", "on", "above", "above"],
        }
        for name in ("checker", "judge")
    }
    table = rig_checker.checker_table(answers)
    assert table.rows["all"]["checker"] == "0.750 of 4" and table.rows["on"]["judge"] == "1.000 of 2"
    fooled = {"base": {"checker": {"agreement": 0.9, "wrong yes": 0.1, "wrong no": 0.05}}}
    rig_study.rig_page(tmp_path / "page.md", ARMS, table, fooled, [0, 1, 2], 160)
    page = (tmp_path / "page.md").read_text()
    assert "| phase 1 + 2 | 0.500 ± 0.248 |" in page and "| base | 0.200 ± 0.000 |" in page
    assert "| base, checker | 0.900 | 0.100 | 0.050 |" in page
    reports.arms_figure(ARMS, {"sg_iou": "SG-IoU", "right": "right"}, tmp_path / "arms.png", "right")
    rig_study.groups_figure({2: ARMS[0], 4: ARMS[1]}, tmp_path / "groups.png")
    runs = [{name: [seed["base"]] * 2 for name in ("raw", "half", "trained")} for seed in ARMS]
    rig_study.t_star_figure((0.3, 0.6), runs, tmp_path / "t_star.png")
    rig_study.reliability_figure(answers, tmp_path / "reliability.png")
    assert len([p for p in tmp_path.glob("*.png") if p.stat().st_size > 5_000]) == 4


def run_folder(folder: Path, base: bool, lead: float, method: str = "SRRL") -> Path:
    folder.mkdir()
    score = {"kind": "physical", "pictures": 8, "accuracy": 0.5, "by_law": {"heat": 0.25}}
    better = score | {"accuracy": 0.5 + lead, "by_law": {"heat": 0.5}}
    rows = [
        {"stage": "evaluation", "step": 0, "model": m, "score": {"reward": r}}
        for m, r in (("base", 0.2), (method, 0.2 + lead))
    ]
    if not base:
        rows = [
            {"stage": "evaluation", "step": 0, "model": m, "scores": {"physical": s}}
            for m, s in (("base", score), (method, better))
        ]
    counts = {"updates_total": 8, "reward_calls": 1_234, "unet_evaluations": 5, "reward": 0.3}
    rows.append({"stage": "srrl", "step": 0} | counts)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_seeds_of_both_kinds_of_runs_make_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for base, rows in (
        (False, ["| physical: accuracy | 0.500 ± 0.000 | 0.650 ± 0.635 | 0.150 ± 0.635 |",
                 "| physical, heat | 0.250 ± 0.000 | 0.500 ± 0.000 | 0.250 ± 0.000 |"]),
        (True, ["| reward | 0.200 ± 0.000 | 0.350 ± 0.635 | 0.150 ± 0.635 |"]),
    ):  # fmt: skip
        folders = [run_folder(tmp_path / f"{base}-{i}", base, lead) for i, lead in enumerate((0.1, 0.2))]
        monkeypatch.setattr(sys, "argv", ["seeds.py", *map(str, folders)])
        seeds.main()
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "| 2 runs | base | SRRL | SRRL - base |" and lines[2:-3] == rows
        assert "reward calls: 1,234, 1,234" in lines
    for other, said in (
        (tmp_path, "no finished run"),
        (tmp_path / "False-0", "the runs have different measures"),
    ):
        monkeypatch.setattr(sys, "argv", ["seeds.py", str(folders[0]), str(other)])
        with pytest.raises(SystemExit) as stop:
            seeds.main()
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_runs_of_several_methods_are_columns_of_one_table_and_curves_of_one_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    leads = {"GRPO": 0.3, "DDPO": 0.1, "SRRL": 0.2}
    folders = [run_folder(tmp_path / name, True, lead, name) for name, lead in leads.items()]
    words = ["seeds.py", *map(str, folders), "--figure", str(tmp_path / "methods.png")]
    monkeypatch.setattr(sys, "argv", words)
    seeds.main()
    lines = capsys.readouterr().out.splitlines()
    ahead = "GRPO - base | DDPO - base | SRRL - base"
    assert lines[0] == f"| 3 runs | base | GRPO | DDPO | SRRL | {ahead} |"
    assert lines[2] == "| reward | 0.200 ± 0.000 | 0.500 | 0.300 | 0.400 | 0.300 | 0.100 | 0.200 |"
    assert (tmp_path / "methods.png").stat().st_size > 5_000


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / str(i), False, 0.1) for i in range(2)]
    words = [sys.executable, str(Path(seeds.__file__)), *map(str, folders)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(60) == 0 and "Traceback" not in process.stderr.read()


def test_the_interval_over_seeds_is_students() -> None:
    values = [0.5, 0.6, 0.7]
    low, high = stats.t.interval(0.95, 2, loc=0.6, scale=stats.sem(values))
    assert reports.over_seeds(values) == f"0.600 ± {(high - low) / 2:.3f}" == "0.600 ± 0.248"
    assert reports.over_seeds([0.25]) == "0.250"
