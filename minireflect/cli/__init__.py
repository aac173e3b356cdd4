"""The console command `minireflect`: the list of commands, and nothing that takes long to import.

minireflect sample "a tall red candle in still air"
minireflect train srrl --rounds 0
minireflect inspect checkpoint.safetensors
"""

import difflib
import sys
from importlib import import_module

from ..commands import TRAINED

COMMANDS = {
    "sample": "sample pictures of prompts, and say what the inspector reads in them",
    "train": "train a model; `minireflect train --help` lists what can be trained",
    "inspect": "say what is in a file: a checkpoint, a LoRA, or a picture of the synthetic world",
}
HELP = ("-h", "--help")
LAST = "`minireflect COMMAND --help` lists the options of a command."
LAST_OF_TRAIN = """\
Minutes are about those of the preset cpu on two cores. `minireflect train COMMAND --help` lists
its options; `minireflect train` alone is `minireflect train srrl`, from the shipped weights."""


def main(words: list[str] | None = None) -> int:
    """Run a command.  -> the exit status: 0, 1 when a check fails, 2 on bad input, 130 when stopped"""
    command, *rest = (sys.argv[1:] if words is None else words) or [""]
    if command in ("", *HELP):
        print(listing("COMMAND", COMMANDS, LAST))
        return 0 if command else 2
    if command == "train" and rest[:1] in ([word] for word in HELP):
        about = {name: f"{row.about} ({row.minutes} min)" for name, row in TRAINED.items()}
        print(listing("train [COMMAND] [OPTIONS]", about, LAST_OF_TRAIN))
        return 0
    try:
        known(command, COMMANDS)
        if command == "train" and rest and not rest[0].startswith("-"):
            known(rest[0], TRAINED)
        return import_module(f".{command}", __name__).main(rest)
    except KeyboardInterrupt:
        print(f"minireflect {command}: stopped; what a run has saved can be resumed", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"minireflect {command}: {error}", file=sys.stderr)
        return 2


def known(name: str, names: dict[str, object]) -> None:
    """Raises ValueError on a command that does not exist, with the nearest one that does."""
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        meant = f", did you mean {near[0]}?" if near else ";"
        raise ValueError(f"there is no command {name!r}{meant} it is one of {', '.join(names)}")


def listing(usage: str, commands: dict[str, str], last: str) -> str:
    """The help of a command that has commands: one line each."""
    lines = [f"  {name:{max(map(len, commands))}}  {about}" for name, about in commands.items()]
    return "\n".join([f"usage: minireflect {usage}", "", *lines, "", last])
