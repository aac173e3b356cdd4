"""Every script says what it does when asked, and does nothing else."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
PROGRAMS = sorted(p.stem for p in SCRIPTS.glob("*.py") if "__main__" in p.read_text())


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_runs_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.setattr(Path, "mkdir", None)  # what runs would make folders
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0 and not any(tmp_path.iterdir())
    about = capsys.readouterr().out
    assert f"scripts/{name}.py" in about and "usage:" in about
