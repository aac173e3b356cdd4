"""The console command `minireflect`: the list of commands, and nothing that takes long to import.

minireflect sample "a tall red candle in still air"
minireflect train srrl --rounds 0
minireflect inspect checkpoint.safetensors
"""

import difflib
import sys

from .commands import COMMANDS, TRAINED


def main(words: list[str] | None = None) -> int:
    """Run a command.  -> the exit status: 0, 1 when a check fails, 2 on bad input, 130 when stopped"""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(
            listing(
                "minireflect COMMAND", COMMANDS, "`minireflect COMMAND --help` lists a command's options."
            )
        )
        return 0 if words else 2
    command, rest = words[0], words[1:]
    try:
        if command not in COMMANDS:
            raise ValueError(unknown(command, COMMANDS))
        if command == "train" and rest and not rest[0].startswith("-") and rest[0] not in TRAINED:
            raise ValueError(unknown(rest[0], TRAINED))
        if command == "train" and rest[:1] in (["-h"], ["--help"]):
            commands = {name: f"{what} ({minutes} min)" for name, (what, minutes) in TRAINED.items()}
            last = (
                "Minutes are about those of the preset cpu on two cores. `minireflect train` alone is\n"
                "`minireflect train srrl`, from the shipped weights. `minireflect train COMMAND --help`\n"
                "lists the options of a command."
            )
            print(listing("minireflect train [COMMAND] [OPTIONS]", commands, last))
            return 0
        if command == "train":
            from .train import main as run
        elif command == "sample":
            from .sample import main as run
        else:
            from .inspect import main as run
        return run(rest)
    except KeyboardInterrupt:
        print(f"minireflect {command}: stopped; what a run has saved can be resumed", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"minireflect {command}: {error}", file=sys.stderr)
        return 2


def unknown(name: str, names: dict[str, object]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    meant = f", did you mean {near[0]}?" if near else ";"
    return f"there is no command {name!r}{meant} it is one of {', '.join(names)}"


def listing(usage: str, commands: dict[str, str], last: str) -> str:
    """The help of a command that has commands: one line each."""
    width = max(map(len, commands))
    return "\n".join(
        [f"usage: {usage}", "", *(f"  {n:{width}}  {what}" for n, what in commands.items()), "", last]
    )
