"""The report of runs: what stands in it, that it asks no network, and that its sliders turn in a browser."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from minireflect.__main__ import main
from minireflect.methods.srrl import SRRLConfig
from minireflect.report import album, curves, described, heading, names, write_report
from minireflect.run import Job, Run, RunError
from minireflect.showcase import STAGES
from minireflect.showcase import album as saved_album
from tests.small import small_pipeline

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def score(share: float, reward: float) -> dict:
    laws = {"by_law": {"heat": share, "wind": share}, "intervals": {"heat": (share - 0.1, share + 0.1)}}
    return {"accuracy": share, "interval": (share - 0.1, share + 0.1), "reward": reward, **laws}


def a_run(folder: Path, right: bool = True, reward: float = 0.8) -> Path:
    """A run of four iterations with two sheets: two prompts, the second of which had two rounds."""
    run = Run(
        folder, {"command": "srrl", "srrl": {"lr": 1e-4, "prompts": "</script><b>"}, "seed": len(str(folder))}
    )
    for step in range(4):
        values = {
            "reward_calls": 10 * step,
            "reward_by_round": [0.1 * step, 0.5],
            "reward": 0.1,
            "kl": -8.85e-4 * step,
        }
        run.log(
            "srrl",
            step,
            **values,
            right_by_round=[0.05 * step] if right else [],
            right=0.0 if right else None,
        )
    for model, share in (("base", 0.4), ("SRRL", 0.7)):
        scores = {"physical": score(share, share if model == "base" else reward)}
        run.log("evaluation", 0, model=model, **{"scores": scores} if right else {"score": {"reward": share}})
    (folder / "album").mkdir()
    for step, red in ((0, 40), (4, 200)):
        Image.new("RGB", (64 * STAGES, 64 * 3), (red, 0, 0)).save(folder / "album" / f"{step:05}.jpg")
        asked = (("a", 0), ("b</script>", 0), ("b</script>", 1))
        known = {"reward": 0.5, "right": True if right else None}
        rows = [{"prompt": prompt, "round": k, **known} for prompt, k in asked]
        (folder / "album" / f"{step:05}.json").write_text(json.dumps(rows))
    return folder


def test_the_heading_says_what_a_run_shows(tmp_path: Path) -> None:
    said = described(a_run(tmp_path / "one", reward=0.72))["heading"]
    assert "physical prompts right 0.40 → 0.70 [0.60, 0.80], by the inspector" in said and "agree" in said
    assert "do not trust the reward" in described(a_run(tmp_path / "hacked", reward=0.9))["heading"]
    real = described(a_run(tmp_path / "real", right=False))["heading"]
    assert real.startswith("Reward of training prompts 0.250 → 0.400 over 4") and "look at them" in real
    assert heading({}, []) == "0 steps logged."


def test_the_truth_stands_beside_the_reward_and_curves_are_short() -> None:
    rows = [
        {"step": i, "reward_calls": i, "reward_by_round": [0.5, 0.1], "right_by_round": [0.25]}
        for i in range(900)
    ]
    (plot,) = curves(rows)
    assert [line["kind"] for line in plot["lines"]] == ["reward", "right"]
    assert plot["lines"][0]["points"][1] == (5, 0.5) and len(plot["lines"][1]["points"]) == 180


def test_a_page_has_the_laws_costs_and_options_of_every_run(tmp_path: Path) -> None:
    folders = [a_run(tmp_path / name) for name in ("one", "two")]
    assert main(["report", *map(str, folders), "-o", str(tmp_path / "new" / "page.html")]) == 0
    page = (tmp_path / "new" / "page.html").read_text()
    runs = json.loads(re.search(r"const runs = (\[.*\]);", page)[1])
    assert [run["name"] for run in runs] == ["one", "two"]
    base, SRRL = (runs[0]["laws"]["physical, test prompts"][m] for m in ("base: 0.40", "SRRL: 0.70"))
    assert base["heat"] == pytest.approx([0.4, 0.3, 0.5]) and SRRL["heat"] == pytest.approx([0.7, 0.6, 0.8])
    assert base["wind"] == [0.4, 0.4, 0.4]  # no interval was logged
    assert runs[0]["cost"] == {"iterations": 4, "reward calls": 30}
    assert runs[1]["config"]["srrl.lr"] == "0.0001" and [a["step"] for a in runs[1]["album"]] == [0, 4]
    assert page.count("</script>") == 1 and not re.search(
        r"""(src|href)=["']?http|url\(http|import |fetch\(""", page
    )


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    torn = [tmp_path / "torn"], "config.json is not JSON"
    for folders, said in (([], "there is no run"), ([tmp_path / "none"], "config.json"), torn):
        with pytest.raises(RunError, match=said):
            write_report(folders, tmp_path / "page.html")
    assert main(["report", "--foo"]) == 2
    assert names([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"] and names([Path("a/x")]) == ["x"]
    run = a_run(tmp_path / "run")
    (run / "album" / "00004.jpg").unlink()
    assert [a["step"] for a in described(run)["album"]] == [0]


SPOILT = {  # what becomes of a sheet and of its rows, and what the warning says
    "cut": (lambda jpg, rows: jpg.write_bytes(jpg.read_bytes()[:400]), "not a picture that can be read"),
    "empty": (lambda jpg, rows: jpg.write_bytes(b""), "not a picture that can be read"),
    "killed between the two files": (lambda jpg, rows: rows.unlink(), "json does not exist"),
    "rows that are cut": (lambda jpg, rows: rows.write_text('[{"prom'), "is not JSON"),
    "rows of numbers": (lambda jpg, rows: rows.write_text("[1, 2]"), "must be an object, got 1"),
    "rows of another version": (lambda jpg, rows: rows.write_text('[{"prompt": "a"}]'), "round.0. must be"),
    "a copy": (lambda jpg, rows: jpg.rename(jpg.with_name("copy.jpg")), "copy.jpg is left out: invalid"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_damaged_sheet_is_left_out_with_a_warning(tmp_path: Path, name: str) -> None:
    sheet = a_run(tmp_path / "run") / "album" / "00004.jpg"
    spoil, told = SPOILT[name]
    spoil(sheet, sheet.with_suffix(".json"))
    with pytest.warns(UserWarning, match=f"is left out: .*{told}|{told}"):
        assert [each["step"] for each in album(tmp_path / "run")] == [0]


def test_a_run_of_another_version_is_shown_as_far_as_it_is_known(tmp_path: Path) -> None:
    """Also from a place of another name, where nothing is written."""
    run = a_run(tmp_path / "before").rename(tmp_path / "after")
    with open(run / "metrics.jsonl", "a") as file:
        for values in ({"novelty": {"a": [1]}, "loss": "low"}, {"novelty": None, "loss": 0.5}):
            file.write(json.dumps({"stage": "future", "step": 0, **values}) + "\n")
    files = {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
    write_report([run], tmp_path / "report.html")
    (plot,) = described(run)["curves"]["future"]
    assert plot["lines"][0]["points"] == [(0, 0.5)] and '"after"' in (tmp_path / "report.html").read_text()
    assert files == {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
    with open(run / "metrics.jsonl", "a") as file:
        odd = {"score": {"physical": {"by_law": [1]}}, "model": "odd"}
        file.write(json.dumps({"stage": "evaluation", "step": 0, **odd}) + "\n")
    with pytest.raises(ValueError, match=r"\.physical must be an object or"):
        described(run)


def test_a_page_replaces_nothing_but_a_page(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    with pytest.raises(RunError, match=r"metrics.jsonl, whose name must end in .html"):
        write_report([run], run / "metrics.jsonl")


def test_an_album_has_a_row_for_each_round_and_changes_no_stream(tmp_path: Path) -> None:
    run, pipe = Run(tmp_path / "run", {}), small_pipeline()
    half = lambda images, texts: (torch.arange(len(images)) % 2).float()  # noqa: E731
    config = SRRLConfig(iterations=12, rounds=1, steps=4, renoise_steps=2, group=4)
    watch = saved_album(pipe, half, ["ball", "block"], config, Job(run))
    before = torch.get_rng_state()
    for step in range(13):
        watch(step)
    assert torch.equal(before, torch.get_rng_state())
    pages = album(run.folder)
    assert [page["step"] for page in pages] == [0, 3, 6, 9, 12]
    rows = pages[0]["rows"]
    assert [(r["prompt"], r["round"], r["reward"]) for r in rows] == [
        ("ball", 0, 0),
        ("block", 0, 1),
        ("ball", 1, 0),
    ]
    with Image.open(run.folder / "album" / "00000.jpg") as sheet:
        assert sheet.size == (64 * STAGES, 64 * 3)
    assert len({(run.folder / "album" / f"{s:05}.jpg").read_bytes() for s in (0, 6)}) == 1  # the same noise


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_sliders_turn_in_a_browser_without_network(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    write_report(
        [a_run(tmp_path / "srrl"), a_run(tmp_path / "real", right=False)], page := tmp_path / "page.html"
    )
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab, errors, asked = browser.new_page(), [], []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        shown = lambda: tab.inner_html("#albums")  # noqa: E731
        for name in ("iteration", "round", "stage"):
            before = shown()
            tab.locator(f"#{name}").fill("0")
            assert shown() != before, name
        assert tab.locator("#albums figure").count() == 4 and tab.locator("#pairs figure").count() == 8
        assert tab.locator("#curves polyline").count() == 2 * 2 + 1 and tab.locator("#laws .bar").count() == 4
        inside = "[...document.querySelectorAll('svg text')].every(t => t.getBBox().x >= 0)"
        assert tab.evaluate(inside), "a label of an axis is cut off"
        assert not errors and all(url.startswith(("file:", "data:")) for url in asked)
        browser.close()
