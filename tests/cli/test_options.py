"""The options of all commands together: few, each with help, shown quickly and on one screen."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
from tyro.conf import Suppress

from minireflect.__main__ import COMMANDS
from minireflect.cli import TRAINED, Option, options
from minireflect.cli.sample import SampleOptions
from minireflect.cli.train import defaults
from minireflect.config import options_of
from minireflect.ranges import hints
from tests.cli.console import ROOT, run

LORA = "srrl --base x"


def records() -> dict[str, Any]:
    """The options of each command."""
    names = {name: name.split() for name in (*TRAINED, LORA)}
    trained = {f"train {name}": options_of(defaults(words[0], words[1:])) for name, words in names.items()}
    return trained | {"sample": SampleOptions()}


def commands() -> Iterator[tuple[str, list[Option]]]:
    for name, record in records().items():
        yield name, list(options(record))


def sources(record: Any) -> Iterator[tuple[type, str]]:
    """The class that defines each option of a record, and the name of its field."""
    home = getattr(record, "SOURCE", type(record))
    for name, hint in hints(type(record)).items():
        if is_dataclass(value := getattr(record, name)):
            yield from sources(value)
        elif Suppress not in getattr(hint, "__metadata__", ()):
            yield [c for c in home.__mro__ if name in vars(c).get("__annotations__", {})][-1], name


def test_every_option_has_help() -> None:
    silent = {f"{command} {o.flag}" for command, found in commands() for o in found if len(o.help) < 4}
    assert not silent


def test_there_are_at_most_130_options() -> None:
    names = {
        o.flag.split()[0] for _, found in commands() for o in found
    }  # a name means the same in all commands
    assert len(names) <= 130, len(names)
    values = {pair for record in records().values() for pair in sources(record)}  # as many can be chosen
    assert len(values) <= 130, len(values)


def test_no_two_options_of_a_command_share_a_name() -> None:
    for command, found in commands():
        flags = [o.flag.split()[0] for o in found]
        assert len(flags) == len(set(flags)), command


@pytest.mark.parametrize("columns, method", [(80, "srrl"), (80, "ddpo"), (100, "srrl"), (120, "srrl")])
def test_help_of_the_main_command_fits_a_screen(
    columns: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    said = run("train", "srrl", "--method", method, "--help", cwd=ROOT).stdout.splitlines()
    assert len(said) <= 45 and max(map(len, said)) <= columns


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
HELP = """
import gc, os, resource, sys, torch
from minireflect.__main__ import main
gc.collect(), gc.freeze()  # a child that looks at them would copy them
own = resource.getrusage(resource.RUSAGE_SELF)
for command in sys.argv[1:]:
    process = os.fork()
    if not process:
        sys.stdout = open(os.devnull, "w")
        os._exit(main([*command.split(), "--help"]))
    _, status, used = os.wait4(process, 0)
    assert status == 0
    print(own.ru_utime + own.ru_stime + used.ru_utime + used.ru_stime)
"""


def seconds(*words: str) -> float:
    """Of CPU, for a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=ROOT, env=ENVIRONMENT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_help_takes_at_most_two_seconds() -> None:
    """Of CPU, or half more than torch, which a busy machine slows too.  What is quick once is quick."""
    taken = (seconds("-m", "minireflect", "train", "srrl", "--help") for _ in range(3))
    assert any(t <= 2.0 or t <= 1.5 * seconds("-c", "import torch") for t in taken)


@pytest.mark.slow
def test_help_of_every_command_takes_at_most_two_seconds() -> None:
    """Each is forked off a process that has imported torch: what that took is added."""
    late = ["sample", *[f"train {command}" for command in TRAINED]]
    for _ in range(3):
        words = [sys.executable, "-c", HELP, *late]
        done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
        taken = [*map(float, done.stdout.split())]
        limit = 2.0 if max(taken) <= 2.0 else max(2.0, 1.5 * seconds("-c", "import torch"))
        late = [c for c, t in zip(late, taken, strict=True) if t > limit]
        if not late:
            return
    raise AssertionError(f"slow help: {late}, {taken} s where {limit} s are allowed")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["train", "--help"], ["train", "trian"], ["trian"], ["inspect"], ["inspect", "--help"]],
)
def test_lists_and_mistakes_need_no_torch(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert "torch was imported" not in done.stderr and "Traceback" not in done.stderr


def test_the_list_of_commands_is_one_line_each() -> None:
    said = run("train", "--help", cwd=ROOT).stdout
    assert all(f"\n  {name} " in said for name in TRAINED)
    said = run("--help", cwd=ROOT).stdout
    assert all(f"\n  {name} " in said for name in COMMANDS)
