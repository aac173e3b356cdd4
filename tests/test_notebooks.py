"""The notebooks are stepped through: they run, have the form of a lesson, and define nothing that the library
has.

`python -m tests.test_notebooks NAME...` runs notebooks, and saves them with their outputs and small pictures.
"""

import ast
import base64
import io
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbclient
import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from PIL import Image

from tests.parity.checkpoints import trainable

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
LARGEST = 1_500_000  # bytes of a file, pictures included
MEMORY = ["--HistoryManager.hist_file=:memory:"]  # two kernels would wait for one file
DPI, MEDIAN, LONGEST, WIDEST = 110, 10, 25, 105  # of a figure; code lines of a cell, columns of a page


def sources(notebook: dict, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def seconds(path: Path) -> int:
    """What the notebook of this name, or the one that a solution belongs to, says that it takes to run."""
    first = sources(json.loads((ROOT / "notebooks" / path.name).read_text()), "markdown")[0]
    return int(re.search(r"and (\d+) seconds to run", first)[1])


def outputs(notebook: dict) -> list[dict]:
    return [out for cell in notebook["cells"] for out in cell.get("outputs", [])]


def pictures(notebook: dict) -> list[Image.Image]:
    found = [out["data"]["image/png"] for out in outputs(notebook) if "image/png" in out.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in found]


def code_lines(code: str) -> int:
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in code.splitlines())


def executed(path: Path) -> nbformat.NotebookNode:
    """In a fresh kernel, from the notebook's own folder; nbclient raises on the first cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    return notebook


def stepped_through(path: Path) -> None:
    """As `executed`, in a kernel, by the blocking client and without the outputs.

    nbclient's asynchronous client sometimes misses a reply that has arrived, and waits until its timeout.
    """
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(path.parent), extra_arguments=MEMORY)
    try:
        for code in sources(json.loads(path.read_text()), "code"):
            how = {"allow_stdin": False, "output_hook": lambda message: None}
            reply = client.execute_interactive(code, timeout=300, **how)["content"]
            assert reply["status"] == "ok", "\n".join(reply["traceback"])
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.fixture(scope="session")
def stepper() -> Iterator[subprocess.Popen]:
    """The process of tests/stepped.py."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("MINIREFLECT_BASE", None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "tests.stepped"], env=environment, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MINIREFLECT_BASE", raising=False)


LONGEST_FIRST = sorted(NOTEBOOKS + SOLUTIONS, key=seconds, reverse=True)  # no worker waits for another


@pytest.mark.notebook
@pytest.mark.parametrize("path", LONGEST_FIRST, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_notebook_runs(path: Path, stepper: subprocess.Popen) -> None:
    print(path, file=stepper.stdin, flush=True)
    assert json.loads(stepper.stdout.readline()) == ""


@pytest.mark.notebook
def test_a_notebook_with_a_cell_that_fails_is_told(tmp_path: Path, stepper: subprocess.Popen) -> None:
    """An error, the end of the process, a cell that takes too long; the next notebook still runs."""
    late = "import signal, time\nsignal.alarm(1)\ntime.sleep(60)"  # as after SECONDS
    for code, told in (("1 + 1", ""), ("1 / 0", "ZeroDivisionError"), ("import os; os.abort()", "status 6"),
                       (late, "status 14"), ("2 + 2", "")):  # fmt: skip
        cells = [nbformat.v4.new_code_cell(c) for c in ("%matplotlib inline", code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "x.ipynb")
        print(tmp_path / "x.ipynb", file=stepper.stdin, flush=True)
        said = json.loads(stepper.stdout.readline())
        assert told in said if told else not said


@pytest.mark.notebook
def test_checkpoint_notebook_runs_on_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINIREFLECT_BASE", str(trainable(tmp_path)))
    stepped_through(ROOT / "notebooks" / "7_real_checkpoints.ipynb")


@pytest.mark.notebook
def test_a_slider_draws_another_picture_when_it_is_moved() -> None:
    """In a kernel: what the slider's output holds at the end is the figure of the value that was set."""
    draw = "lambda eta: curves(None, Panel(f'eta {eta}', 'x', 'y', [Line('a', [0, 1], [0, eta])]))"
    codes = [
        "%matplotlib inline",
        f"from minireflect.figures import Line, Panel, curves, slider\ndraw = {draw}",
        "slider('eta', [0.0, 0.5], draw)",
        "import gc\nfrom ipywidgets import SelectionSlider\n"
        "(moved,) = [x for x in gc.get_objects() if isinstance(x, SelectionSlider)]\nmoved.value = 0.5",
        "draw(0.0)",
        "draw(0.5)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    first, second = (out["data"]["image/png"] for cell in notebook.cells[4:] for out in cell.outputs)
    models = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    (output,) = (model["state"] for model in models if model["model_name"] == "OutputModel")
    assert [out["data"]["image/png"] for out in output["outputs"]] == [second] and first != second


def test_every_notebook_has_a_solution() -> None:
    assert len(NOTEBOOKS) >= 10 and [p.name for p in SOLUTIONS] == [p.name for p in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_a_lesson(path: Path) -> None:
    """Question, minutes, prerequisites, equation, prediction, answer, exercises, each with a solution."""
    notebook = json.loads(path.read_text())
    texts, codes = sources(notebook, "markdown"), sources(notebook, "code")
    for part in ("**Question.**", "minutes to read", "to run on one core", "Know before:"):
        assert part in texts[0], f"the first cell lacks {part}"
    read, run = re.search(r"about (\d+) minutes to read and (\d+) seconds to run", texts[0]).groups()
    (row,) = (
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if f"({path.parent.name}/{path.name})" in line
    )
    assert f"| {read} min + {run} s |" in row, "README says another time"
    assert "## Answer" in texts[-1] and notebook["cells"][-1]["cell_type"] == "markdown"
    assert any("$$" in text for text in texts), "no displayed equation"
    assert any("**Predict" in text for text in texts)
    asked = texts[-1].split("## Change this, predict, run")[1]
    exercises = [i for i in range(1, 9) if f"\n{i}. " in asked]
    assert len(exercises) >= 3 and f"solutions/{path.name}" in asked
    solved = "\n".join(sources(json.loads((path.parent / "solutions" / path.name).read_text()), "markdown"))
    assert all(f"## {i}. " in solved for i in exercises), "an exercise without a solution"
    lengths = [code_lines(code) for code in codes]
    assert statistics.median(lengths) <= MEDIAN and max(lengths) <= LONGEST, lengths
    assert len(pictures(notebook)) >= len(codes) / 4, "too few pictures"
    drawn = [pictures({"cells": [cell]}) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    without_kernel = [shown for shown, code in zip(drawn, codes[1:]) if "slider(" in code]
    assert all(without_kernel), "a slider without a figure in the cell above it"


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_notebook_is_committed_as_it_should_be_read(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for code in sources(notebook, "code"):  # models, samplers, losses and figures live in the library
        tree = ast.parse("\n".join(line for line in code.splitlines() if not line.startswith("%")))
        assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for word in ("denoise", "renoise", "ddim", "loss", "ppo", "show", "light"):
            assert not [f for f in functions if word in f]
        assert "pyplot" not in code and "rcParams" not in code
    for number, cell in enumerate(c for c in notebook["cells"] if c["cell_type"] == "code"):
        assert cell["execution_count"] == number + 1, "committed as run once, from top to bottom"
    assert all(len(line) <= WIDEST for code in sources(notebook, "code") for line in code.splitlines())
    for out in outputs(notebook):
        assert out["output_type"] != "error" and out.get("name") != "stderr", out
        written = "".join(out.get("text", "")) + "".join(out.get("data", {}).get("text/plain", ""))
        assert not any(trace in written for trace in ("/tmp/", "/home/", "/root/", "Warning")), written
    for image in pictures(notebook):
        assert round(image.info["dpi"][0]) >= DPI and image.width >= 2 * DPI, image.size
    assert path.stat().st_size < LARGEST


def committed(path: Path) -> None:
    """Run a notebook and save it: streams joined, pictures in a palette, no state of widgets."""
    notebook = executed(path)
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        joined: list[dict] = []
        for out in cell.get("outputs", []):
            if any("widget-view" in kind for kind in out.get("data", {})):
                continue
            if joined and out.get("name") and joined[-1].get("name") == out["name"]:
                joined[-1]["text"] += out["text"]
                continue
            if "image/png" in out.get("data", {}):
                out["data"] = {"image/png": smaller(out["data"]["image/png"])}
            joined.append(out)
        if "outputs" in cell:
            cell["outputs"] = joined
    nbformat.write(notebook, path)


def smaller(png: str) -> str:
    """A PNG in the 128 colours, of steps of 8, that fit best: a sampled picture's paper is one of them."""
    image, file = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    dpi = image.info["dpi"]
    image = image.convert("RGB").point([min(255, (v + 4) // 8 * 8) for v in range(256)] * 3)
    image = image.quantize(128, Image.Quantize.MEDIANCUT, kmeans=3, dither=Image.Dither.NONE)
    image.save(file, "PNG", optimize=True, dpi=dpi)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        committed(Path(name))
