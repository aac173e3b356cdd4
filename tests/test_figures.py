"""Figures: what they show, read back from matplotlib's own objects; making them touches no backend."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from minireflect import figures
from minireflect.evaluate import law_bars
from minireflect.evaluate_graphs import loop_bars
from minireflect.figures import Line, Panel, of_run


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, in order."""
    kept, plain = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (kept.append(figure), plain(figure, path)))
    return kept


def labelled(figure: Figure) -> None:
    for axes in figure.axes:
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel() and axes.get_legend()


@pytest.mark.slow
def test_figures_touch_no_backend(tmp_path: Path) -> None:
    """A notebook's inline backend survives; matplotlib is imported when the first figure is made, and pyplot
    never.
    """
    code = f"""
import sys
from pathlib import Path
from minireflect import figures, showcase
assert "matplotlib" not in sys.modules
import matplotlib
matplotlib.use("svg")
line = figures.Line("a", [0, 1], [0, 1])
figures.curves(Path({str(tmp_path / "x.png")!r}), figures.Panel("t", "x", "y", [line]))
assert matplotlib.get_backend() == "svg" and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "x.png").exists()


def test_the_running_mean_is_shorter_at_the_start() -> None:
    assert figures.smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert figures.smooth([1, 2, 3], 1) == [1, 2, 3]


def test_a_smoothed_curve_has_its_values_behind_it(tmp_path: Path, saved: list[Figure]) -> None:
    lines = [Line("a", [0, 1, 2], [1.0, 3.0, 5.0], "#123456", span=2), Line("b", [0, 1], [0.5, 0.5])]
    figures.curves(tmp_path / "new" / "x.png", Panel("title", "x", "y", lines, [("level", 2.0, "red")]))
    drawn = [(line.get_label(), list(line.get_ydata())) for line in saved[0].axes[0].lines]
    assert drawn[0] == ("a", [1, 2, 4]) and drawn[1][1] == [1, 3, 5] and drawn[2] == ("b", [0.5, 0.5])
    assert drawn[3] == ("level", [2, 2]) and (tmp_path / "new" / "x.png").stat().st_size > 5_000
    labelled(saved[0])


def test_curves_that_are_compared_have_the_same_range_of_x() -> None:
    short, long = (Panel(str(n), "calls", "y", [Line("a", [0, n], [0, 1])]) for n in (10, 50))
    one, two = figures.curves(None, short, long).axes
    assert one.get_xlim() == two.get_xlim() and one.get_xlim()[1] >= 50
    one, two = figures.curves(None, short, long._replace(xlabel="seconds")).axes
    assert one.get_xlim()[1] < 20


def test_letters_grow_with_a_figure_that_a_page_shrinks() -> None:
    image = torch.zeros(3, 8, 8)
    for columns in (4, 12):
        figure = figures.gallery([(image, "right", True)] * columns, columns)
        (size,) = {text.get_size() for text in figure.axes[0].texts}
        shown = size * min(1, figures.PAGE / figure.get_figwidth())
        assert shown == pytest.approx(figures.FONT)


ROWS = [
    {
        "step": i,
        "reward_calls": 10 * i,
        "loss": 1 / (i + 1),
        "reward_by_round": [0.5, 0.6][: 1 + i % 2],
        "right_by_round": [0.4, 0.5],
        "latent_mean": [0.0, 0.1],
        "latent_std": [1.0, 0.9],
        "reward": 0.6,
        "accepted": 0.5,
        "right": 0.25,
        "alpha_text": 0.0,
        "alpha_image": 0.1,
        **({"text_entropy": 1.0, "image_entropy": 2.0} if i else {}),
    }
    for i in range(4)
]


def test_every_plot_of_a_run_has_title_labels_and_truth_beside_the_reward(
    tmp_path: Path, saved: list[Figure]
) -> None:
    path = tmp_path / "reward.png"
    lines = [Line("nats", "step", "loss", span=25)]
    figures.curves(path, of_run(Panel("training", "step", "nats", lines, log=True), ROWS))
    for panels in ([figures.LEARNING], [figures.UNREAD], figures.LATENTS, [figures.EDITS], figures.TOKENS):
        figures.curves(path, *(of_run(panel, ROWS) for panel in panels))
    for figure in saved:
        labelled(figure)
    shown = {line.get_label(): list(line.get_ydata()) for line in saved[1].axes[0].lines}
    assert shown["learned reward, mean"] == pytest.approx([0.5] * 4)
    assert shown["right by the inspector, share"] == pytest.approx([0.4] * 4)
    rounds = saved[2].axes[0].lines  # of round 1 only the iterations that had one
    assert {line.get_label(): list(line.get_xdata()) for line in rounds if line.get_label() == "round 1"} == {
        "round 1": [10, 30]
    }
    for axes in (*saved[4].axes, saved[5].axes[0]):
        assert any("right" in line.get_label() and "inspector" in line.get_label() for line in axes.lines)


def test_bars_of_laws_have_intervals(tmp_path: Path, saved: list[Figure]) -> None:
    score = {"pictures": 32, "accuracy": 0.5, "by_law": {"heat": 0.25, "wind": 0.75}}
    score["intervals"] = {"heat": (0.1, 0.5), "wind": (0.5, 0.9)}
    models = {"base": {"physical": score}, "SRRL": {"physical": score}}
    figures.bars(tmp_path / "x.png", "share, 95 % intervals", law_bars(models))
    axes = saved[0].axes[0]
    labelled_x = axes.get_xlabel()
    assert (
        "95 %" in labelled_x
        and axes.get_title()
        and [t.get_text() for t in axes.get_yticklabels()] == ["heat", "wind"]
    )
    assert [round(bar.get_width(), 2) for bar in axes.patches] == [0.25, 0.75] * 2
    (low, high), _ = (segment[:, 0] for segment in axes.collections[0].get_segments())
    assert (low, high) == pytest.approx((0.1, 0.5))


def test_bars_of_loops_say_what_they_cost(tmp_path: Path, saved: list[Figure]) -> None:
    loops = {
        name: {"sg_iou": 0.1 * k, "right": 0.1 * k, "evaluations": 20 * k}
        for k, name in enumerate(("base", "loop"))
    }
    figures.bars(tmp_path / "x.png", "share", loop_bars(loops))
    assert saved[0].axes[0].get_legend()
    figures.bars(tmp_path / "x.png", "share", {"one group": {"": {"loop": (0.5, 0.4, 0.6)}}})
    assert not saved[1].axes[0].get_legend()
    assert [t.get_text() for t in saved[0].axes[0].get_yticklabels()][1] == "loop\n20 UNet evaluations"
    assert [round(bar.get_width(), 2) for bar in saved[0].axes[0].patches] == [0, 0.1, 0, 0.1]


@pytest.mark.parametrize("abreast", [1, 2])
def test_a_strip_shows_every_picture_with_its_frame_and_words(
    tmp_path: Path, saved: list[Figure], abreast: int
) -> None:
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 8, 8)
    rows = [
        [(red, "right", True), (-red, "wrong: reads as " + "a long story " * 5, False)],
        [(red, "", None)],
    ]
    figures.strip(
        rows, ["first prompt", "second prompt"], ["round 0", "round 1"], tmp_path / "x.png", abreast
    )
    (axes,) = saved[0].axes
    axes.figure.draw_without_rendering()
    marks = [text for text in axes.texts if text.get_ha() == "center"]
    others = [text.get_text() for text in axes.texts if text not in marks]
    assert sorted(others) == sorted(["first prompt", "second prompt", "round 1", *["round 0"] * abreast])
    assert marks[0].get_text() == "right" and marks[1].get_text().count("\n") >= 3
    assert np.asarray(axes.images[0].get_array())[0, 0].tolist() == [255, 0, 0]
    frames = [patch.get_edgecolor()[:3] for patch in axes.patches]
    assert frames[0][1] > 0.6 and frames[1][0] > 0.8 and max(frames[2]) < 0.3  # green, red, ink
    shown = [image.get_window_extent() for image in axes.images]
    assert len(shown) == 3 == len(frames)
    for picture, patch, mark in zip(shown, axes.patches, marks):
        place, below = patch.get_window_extent(), mark.get_window_extent()
        assert abs(picture.x0 - place.x0) < 2 and abs(picture.y1 - place.y1) < 2
        assert below.y1 < picture.y0 < below.y1 + 15 and abs(below.x0 + below.x1 - place.x0 - place.x1) < 4
    boxes = shown + [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    width, height = axes.figure.bbox.max
    assert all(box.x0 >= -1 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height + 1 for box in boxes)


def test_a_head_stands_above_a_column_that_only_rows_below_have(tmp_path: Path, saved: list[Figure]) -> None:
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 8, 8)
    rows = [[(red, "right", True)], [(red, "", None)] * 2]
    figures.strip(rows, ["short", "long"], ["round 0", "round 1", "round 2"], tmp_path / "x.png")
    (axes,) = saved[0].axes
    words = [text.get_text() for text in axes.texts if text.get_ha() == "left"]
    assert sorted(words) == ["long", "round 0", "round 1", "short"] and len(axes.images) == 3
    heads = [text for text in axes.texts if text.get_weight() == "bold"]
    assert [text.get_text() for text in heads] == ["round 0", "round 1"]
    below = [image.get_extent()[0] for image in axes.images[1:]]
    assert [text.get_position()[0] for text in heads] == pytest.approx(below)


def test_wrap_breaks_at_words_and_keeps_lines() -> None:
    assert figures.wrap("a red ball\non a blue box", 8) == "a red\nball\non a\nblue box"


def test_a_gallery_shows_pictures_at_128_pixels_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 64, 64)
    cells = [(red, "right", True), None, (red, "wrong: " + "a long story " * 4, False), (red, "", None)]
    figure = figures.gallery(cells, 3, ["round 0", "round 1"])
    assert figure.dpi >= 110
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert len(axes.images) == 3 and {"round 0", "round 1"} <= {text.get_text() for text in axes.texts}
    for image in axes.images:
        assert min(image.get_window_extent().width, image.get_window_extent().height) >= 128
    left, right, below = (image.get_extent() for image in axes.images)  # the second place stays empty
    assert right[0] > left[1] + 1 and below[0] == left[0] and below[3] > left[2]
    assert figures.curves(None, Panel("t", "x", "y", [Line("a", torch.arange(3), torch.arange(3))])).axes


def test_a_slider_needs_ipywidgets_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert figures.slider("eta", [0.0, 1.0], lambda eta: Figure()) is None
    assert "pip install -e '.[notebooks]'" in capsys.readouterr().out


def test_a_prompt_with_dollars_is_drawn_as_text(tmp_path: Path) -> None:
    cell = (torch.zeros(3, 8, 8), "read as $\\frac{$", None)
    label = "a tall red candle $\\frac{$ in still air\x00\ud800\x1b[31m"
    figures.strip([[cell]], [label], ["$^$"], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1_000
