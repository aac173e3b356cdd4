"""The notebooks run, have outputs and exercises, and define nothing that the library has."""

import ast
import json
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.parity.checkpoints import trainable

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 400_000  # bytes of a file, pictures included


def sources(notebook: dict, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 10


def execute(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh kernel, from the notebook's own folder; nbclient raises on the first cell that fails."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIREFLECT_BASE", raising=False)
    execute(path, monkeypatch)


@pytest.mark.notebook
def test_checkpoint_notebook_runs_on_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINIREFLECT_BASE", str(trainable(tmp_path)))
    execute(ROOT / "notebooks" / "7_real_checkpoints.ipynb", monkeypatch)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_as_it_should_be_read(path: Path) -> None:
    notebook = json.loads(path.read_text())
    texts, codes = sources(notebook, "markdown"), sources(notebook, "code")
    assert "**Question.**" in texts[0] and "## Answer" in texts[-1], (
        "one question, stated first, answered last"
    )
    exercises = texts[-1].split("## Change this, predict, run")[1]
    assert 3 <= sum(f"\n{i}. " in exercises for i in range(1, 9)) <= 4
    assert notebook["cells"][-1]["cell_type"] == "markdown"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])

    for code in codes:  # models, samplers and losses live in the library
        tree = ast.parse("\n".join(line for line in code.splitlines() if not line.startswith("%")))
        assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not {
            f for f in functions if any(w in f for w in ("denoise", "renoise", "ddim", "loss", "ppo"))
        }

    outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", [])]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= len(codes) / 3, "too few pictures"
    for number, cell in enumerate(c for c in notebook["cells"] if c["cell_type"] == "code"):
        assert cell["execution_count"] == number + 1, "committed as run once, from top to bottom"
    for out in outputs:
        assert out["output_type"] != "error" and out.get("name") != "stderr", out
        written = "".join(out.get("text", "")) + "".join(out.get("data", {}).get("text/plain", ""))
        assert not any(trace in written for trace in ("/tmp/", "/home/", "/root/", "Warning")), written
    assert path.stat().st_size < LARGEST
