"""The options of all commands together: few, each with help, shown quickly and on one screen."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minireflect.__main__ import COMMANDS
from minireflect.cli import TRAINED, Option, options
from minireflect.cli.sample import SampleOptions
from minireflect.cli.train import defaults
from minireflect.config import options_of
from tests.cli.console import ROOT, run

LORA = "srrl --base x"


def commands() -> Iterator[tuple[str, list[Option]]]:
    for name in (*TRAINED, LORA):
        words = name.split()
        yield f"train {name}", list(options(options_of(defaults(words[0], words[1:]))))
    yield "sample", list(options(SampleOptions()))


def test_every_option_has_help() -> None:
    silent = {f"{command} {o.flag}" for command, found in commands() for o in found if len(o.help) < 4}
    assert not silent


def test_there_are_at_most_130_options() -> None:
    names = {
        o.flag.split()[0] for _, found in commands() for o in found
    }  # a name means the same in all commands
    assert len(names) <= 130, len(names)
    fields = {o.field for _, found in commands() for o in found}  # as many values can be chosen
    assert len(fields) <= 130, len(fields)


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


def cpu_seconds(words: list[str], **environment: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *words], check=True, capture_output=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def slow_help(*words: str) -> bool:
    """Whether a help takes over 2 s of CPU, and half more than torch, which a busy machine slows too."""
    for _ in range(3):  # what is quick once is quick; a busy machine gets another chance
        taken = cpu_seconds(["-m", "minireflect", *words, "--help"])
        if taken <= 2.0 or taken <= 1.5 * cpu_seconds(["-c", "import torch"]):
            return False
    return True


@pytest.mark.parametrize("words", [[], ["train"], ["train", "srrl"], ["sample"]])
def test_help_takes_at_most_two_seconds(words: list[str]) -> None:
    assert not slow_help(*words)


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAINED)
def test_help_of_every_training_takes_at_most_two_seconds(command: str) -> None:
    assert not slow_help("train", command)


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
