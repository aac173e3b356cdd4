"""CONTRIBUTING.md: the ninth law that it shows is a law of this world, read back from pixels without another
line.
"""

import re
from pathlib import Path

import pytest

from minireflect import caption, inspect, render, sample_scene
from minireflect.world import inspector, laws


def test_the_ninth_law_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    here = dict(vars(laws))
    exec(code, here)
    monkeypatch.setitem(laws.LAWS, "slope", here["Slope"]())
    scenes = [sample_scene(seed=i, law="slope") for i in range(40)]
    inspector._filter.cache_clear()  # it holds every scene of every law
    assert all(inspect(render(scene)).scene.facts == scene.facts for scene in scenes)
    inspector._filter.cache_clear()
    assert "on a slope that falls to the" in caption(scenes[0])
