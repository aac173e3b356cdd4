"""`benchmarks/gpu.py` works the first time that a card is at hand: here in tiny sizes on the CPU."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS, main

TINY = ["--tiny", "--device", "cpu", "--out"]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_and_is_not_done_again(part: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "gpu.jsonl"
    (line,) = main([part, *TINY, str(out)])
    assert not line["error"] and line["rows"] and json.loads(out.read_text()) == line
    if part == "device":
        values = {k: v for row in line["rows"] for k, v in row.items()}
        assert values["noise is the CPU's"] == 1 and values["first ratio - 1, exactly 0"] == 0
        assert values["largest difference of a metric from the CPU's"] == 0
    assert main([part, *TINY, str(out)]) == [line] and len(out.read_text().splitlines()) == 1
    assert f"{part}: " in capsys.readouterr().out


def test_a_part_that_fails_is_told_and_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(place: object):
        yield {"first": 1.0}
        raise RuntimeError("no memory")

    monkeypatch.setitem(PARTS, "rl", fails)
    out = tmp_path / "gpu.jsonl"
    for number in (1, 2):
        line = main(["rl", *TINY, str(out)])[-1]
        assert "no memory" in line["error"] and line["rows"] == [{"first": 1.0}]
        assert len(out.read_text().splitlines()) == number
