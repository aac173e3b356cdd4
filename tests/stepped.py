"""Step through notebooks, each in a fork of one process, so that torch is imported once.

`python -m tests.stepped` reads a path from each line of its input, and answers with a line of JSON: the
traceback of the first cell that failed, or "".  Cells run as in a kernel, in a shell of IPython.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import ipywidgets  # noqa: F401
import torchvision  # noqa: F401
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import minireflect.figures
import minireflect.methods.srrl

SECONDS = 300  # at most, for a cell


class Shell(InteractiveShell):
    def enable_gui(self, gui: str | None = None) -> None:
        """A kernel's event loop needs none for inline figures."""


def step_through(path: Path) -> None:
    os.chdir(path.parent)
    shell = Shell.instance(config=Config(HistoryManager={"enabled": False}))
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            signal.alarm(SECONDS)  # ends the process
            shell.run_cell("".join(cell["source"])).raise_error()


def in_a_fork(path: Path) -> str:
    """Step through a notebook in a process of its own.  -> the traceback of the first failure, or "" """
    answer, told = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        with os.fdopen(answer) as pipe:
            said = pipe.read()
        status = os.waitpid(child, 0)[1]
        return said or (f"the process ended with status {status}" if status else "")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    with os.fdopen(told, "w") as pipe:
        try:
            step_through(path)
        except BaseException:
            pipe.write(traceback.format_exc())
    os._exit(0)


if __name__ == "__main__":
    minireflect.figures.new_figure(1, 1, 1, 1)  # imports matplotlib
    for line in sys.stdin:
        print(json.dumps(in_a_fork(Path(line.strip()))), flush=True)
