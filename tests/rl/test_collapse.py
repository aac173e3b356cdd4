"""Signs of a collapse: grey and noise are named, healthy pictures are not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minireflect.rl import collapse
from minireflect.rl.collapse import PATIENCE, Collapsed, StopRule, signs, statistics, watch
from minireflect.run import Run

BASE = {"size": 0.8, "constant": 0.0, "unreadable": 0.1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 1.3}, "mean |x_0| is 1.30, the base's 0.80"), ({"size": 0.5}, "mean |x_0| is 0.50"),
        ({"constant": 0.6}, "60% of the pictures are nearly constant"),
        ({"unreadable": 0.6}, "60% of the pictures"),
        ({"flat": 1.0}, "nearly all groups"), ({"flat": 0.95}, "nearly all groups"),
        ({"clip_low": 0.95}, "one clip"), ({"clip_high": 0.97}, "one clip"),
    ],
)  # fmt: skip
def test_each_sign_is_named(change: dict[str, float], said: str) -> None:
    (found,) = signs(BASE | change, BASE)
    assert said in found


def test_what_stays_in_the_range_is_no_sign() -> None:
    healthy = {
        "size": 1.1,
        "constant": 0.4,
        "unreadable": 0.5,
        "flat": 0.9,
        "clip_high": 0.9,
        "clip_low": None,
    }
    assert signs(BASE | healthy, BASE) == []
    assert signs(BASE | {"unreadable": 1.0}, BASE | {"unreadable": 1.0}) == []  # as the base


@pytest.mark.parametrize(("before", "now", "said"), [(0.8, 1.0, True), (0.8, 0.95, False), (1.0, 1.0, False)])
def test_pictures_that_are_all_unreadable_are_a_sign_if_some_were_read_before(
    before: float, now: float, said: bool
) -> None:
    base = BASE | {"unreadable": before}
    assert any("unreadable" in sign for sign in signs(base | {"unreadable": now}, base)) is said


def test_statistics_of_grey_and_of_noise() -> None:
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    grey = torch.zeros(2, 3, 64, 64)
    found = statistics(torch.full((4, 4, 8, 8), -2.0), torch.cat([noise, grey]))
    assert found == {"size": 2.0, "constant": 0.5, "unreadable": 1.0}
    assert "unreadable" not in statistics(noise, noise, readable=False)
    for std, constant in ((0.04, 1.0), (0.06, 0.0)):  # hardly any contrast is less than 0.05
        pale = std * noise / noise.flatten(1).std(1).view(-1, 1, 1, 1)
        assert statistics(noise, pale, readable=False)["constant"] == constant


def test_it_is_said_once_and_stops_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, bad = Run(tmp_path, {}), BASE | {"size": 3.0}
    memory: dict = {}
    assert watch(StopRule(), run, memory, BASE) is None
    for _ in range(PATIENCE + 2):
        assert "mean |x_0|" in watch(StopRule(), run, memory, bad)
    assert capsys.readouterr().err.count("may have collapsed") == 1
    memory = {"base": BASE}
    for now in (bad, bad, BASE, bad, bad):  # three in a row end it
        watch(StopRule(stop_on_collapse=True), run, memory, now)
    with pytest.raises(Collapsed, match="stopped by --stop-on-collapse"):
        watch(StopRule(stop_on_collapse=True), run, memory, bad)


def test_the_inspector_reads_sixteen_pictures_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    read, nothing = [], SimpleNamespace(scene=None)
    monkeypatch.setattr(
        collapse, "inspect_all", lambda images: read.append(images) or [nothing] * len(images)
    )
    images = torch.arange(20.0).view(20, 1, 1, 1).expand(20, 3, 64, 64)
    for n in (20, 3):
        assert statistics(images[:n], images[:n])["unreadable"] == 1
    assert [x[:, 0, 0, 0].tolist() for x in read] == [[*range(16)], [0, 1, 2]]


def test_a_picture_of_one_colour_is_constant() -> None:
    """Whatever the colour; contrast in one channel is contrast."""
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(2, 3, 8, 8).clone()
    assert statistics(red, red)["constant"] == 1
    red[0, 1, ::2] = -0.7
    assert statistics(red, red)["constant"] == 0.5
