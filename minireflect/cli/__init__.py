"""What can be typed after `minireflect`: what can be trained, the options of a record, and the help of both.

An option is a field of a record: its name, its default, and the comment above it as help.  No torch here.
"""

import difflib
import inspect
import io
import re
import shutil
import typing
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, NamedTuple

import tyro
from tyro.conf import Positional, Suppress, arg

from ..ranges import Refusal, named, plain, quote

# fmt: off
TRAINED = {  # what `train` can train, and the minutes of the preset cpu on two cores
    "srrl": ("a diffusion model by SRRL, DDPO, GRPO; LoRA: --base", 6),
    "all": ("autoencoder, diffusion, reward and srrl; with --scenes graphs all of RL-RIG", 85),
    "autoencoder": ("pictures to latents and back", 13),
    "diffusion": ("the base: latents from noise and a prompt", 25),
    "reward": ("the learned reward: does the prompt hold for the picture?", 35),
    "rlrig": ("RL-RIG by reinforcement: the Actor, then the editor", 13),
    "checker": ("RL-RIG's Checker, and the judge that measures from outside", 25),
    "actor": ("RL-RIG's Actor: which edit does the picture need?", 13),
    "reason-grpo": ("ReasonGen-R1 by reinforcement: rationale and picture", 17),
    "reason-sft": ("ReasonGen-R1 on true rationales", 45),
    "vq": ("the codebook of image tokens", 11),
    "captioner": ("the reader of rationales: does the picture keep its words?", 11),
}
HELP = {"-h", "--help"}
MINUTES = """\
Minutes are about those of the preset cpu on two cores. `minireflect train COMMAND --help` lists
its options; `minireflect train` alone is `minireflect train srrl`, from the shipped weights."""
# fmt: on
NO_MEMORY = "out ?of ?memory|memoryerror|can't allocate memory|not enough memory|alloc_failed"
SMALLER = """the memory is full; with --base try --micro-batch 1, --checkpointing, --precision bf16 or a
smaller --size, otherwise a smaller --batch""".replace("\n", " ")
METAVARS = {Path: "PATH", int: "N", float: "X"}


def train_help() -> str:
    """The list of what can be trained: one line each."""
    rows = [f"  {name:11}  {about} ({minutes} min)" for name, (about, minutes) in TRAINED.items()]
    return "\n".join(["usage: minireflect train [COMMAND] [OPTIONS]", "", *rows, "", MINUTES])


def absent(what: str, name: str, names: Iterable[str]) -> str:
    """There is no such command or option; and the nearest one that there is."""
    near = difflib.get_close_matches(name[:40].lower(), names, 1)
    return f"there is no {what} {quote(name)}" + (f", did you mean {near[0]}?" if near else ";")


def known(name: str, names: Iterable[str]) -> None:
    """Raises ValueError on a command that does not exist, with the nearest one that does."""
    if name not in names:
        raise ValueError(f"{absent('command', name, names)} it is one of {', '.join(names)}")


def lacks_memory(error: BaseException) -> bool:
    said = f"{type(error).__name__} {error}"
    return not isinstance(error, ValueError) and bool(re.search(NO_MEMORY, said, re.IGNORECASE))


def sentence(error: BaseException) -> str:
    """What went wrong, as one sentence that is safe to print."""
    if isinstance(error, OSError) and error.strerror:
        where = f" {quote(str(error.filename))}" if error.filename else " the disk or the output"
        return f"cannot use{where}: {error.strerror.lower()}"
    if lacks_memory(error):
        return plain(f"{SMALLER} ({str(error).partition(chr(10))[0] or 'MemoryError'})")
    return plain(str(error)) or type(error).__name__


def refuse(message: str) -> None:
    """What argparse calls in place of its own end, which prints several lines."""
    raise Refusal(message)


class Option(NamedTuple):
    group: str  # the field of its record
    flag: str  # as typed, with the default behind it
    help: str  # the comment above the field, and what can be chosen
    field: tuple[type, str]  # where it is first defined
    kind: Any  # the type of its value


@lru_cache
def comments(record: type) -> dict[str, str]:
    """The comment above each field of a dataclass, or above the field that it inherits or replaces."""
    sources = map(inspect.getsource, record.__mro__[-2::-1])  # of all but object, its own the last
    found = re.findall(r"((?: +# .*\n)+) +(\w+): ", "".join(sources))
    return {name: " ".join(re.findall("# (.*)", above)) for above, name in found}


def options(record: Any, prefix: str = "", group: str = "run") -> Iterator[Option]:
    """Every option of a record, those of nested records last; a field with tyro's Suppress is none."""
    home = getattr(record, "SOURCE", type(record))  # `options_of` takes fields from another record
    plain, marked = (typing.get_type_hints(type(record), include_extras=extras) for extras in (False, True))
    nested = []
    for name in (field.name for field in fields(record)):
        value, marks = getattr(record, name), getattr(marked[name], "__metadata__", ())
        flag, kind = f"{prefix}{name.replace('_', '-')}", plain[name]
        if is_dataclass(value):
            nested.append((value, prefix if arg(name="") in marks else f"{flag}.", name))
        elif Suppress not in marks:
            kind = typing.get_args(kind)[0] if value is None else kind  # of `Path | None`
            choices = f" ({'|'.join(typing.get_args(kind))})" if typing.get_origin(kind) is Literal else ""
            owners = [c for c in home.__mro__ if name in vars(c).get("__annotations__", {})]
            shown = f"{flag.upper()} ..." if Positional in marks else typed(flag, value, kind)
            yield Option(group, shown, comments(home).get(name, "") + choices, (owners[-1], name), kind)
    for value, inner, name in nested:
        yield from options(value, inner, name)


def typed(flag: str, value: object, kind: type) -> str:
    """An option as typed, with its default, or without one what it takes."""
    if isinstance(value, bool):
        head, dot, name = flag.rpartition(".")
        return f"--{head}{dot}no-{name}" if value else f"--{flag}"
    shown = METAVARS.get(kind, "NAME") if value is None else value
    return f"--{flag} {' '.join(map(str, shown)) if isinstance(shown, tuple) else shown}"


def read(words: list[str], command: str, about: str, default: Any) -> Any:
    """The record `default` with the options in `words`; if they ask for help, it is printed and all ends."""
    if {*HELP, "--help-all"} & {*words}:
        about += " The value behind a name is its default; --help-all explains every option."
        print(help_text(f"minireflect {command} [OPTIONS]", about, default, full="--help-all" in words))
        raise SystemExit(0)
    said, left = io.StringIO(), []
    try:
        with redirect_stderr(said):
            off = (tyro.conf.HelptextFromCommentsOff,)  # the help is ours
            how = {"default": default, "return_unknown_args": True, "config": off}
            record, left = tyro.cli(type(default), args=words, **how)
    except SystemExit:
        record = None
    if record is None or left:
        raise Refusal(misread(words, left, said.getvalue(), f"minireflect {command}", default))
    return record


def misread(words: list[str], left: list[str], said: str, command: str, record: Any) -> str:
    """What is wrong with the words: `left` are no options, or tyro has `said` why, in a frame."""
    name = partial(re.sub, r"^--(.*\.)?no-", r"--\1")  # of an option that can be turned off
    kinds = {name(option.flag.split()[0]): option.kind for option in options(record)}
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    flags = [name(part.replace("_", "-")) for part in parts]
    if left and re.match("-+[^-0-9.]", left[0]):
        return f"{absent('option', left[0].partition('=')[0], kinds)} {command} --help lists them"
    if left:
        behind = next((f" behind {flag}" for flag in flags[parts.index(left[0]) :: -1] if flag in kinds), "")
        return f"{quote(left[0])} is not expected{behind}; {command} --help lists the options"
    text = re.sub("[│╭╮╰╯─]+|-{3,}", " ", said)
    found = re.search(r"(?:parsing|argument')(--[\w.-]+)", "".join(text.split()))
    if not found or found[1] not in kinds:
        return re.sub(r"^.*Error parsing [\w.]+: | For full helptext.*$", "", " ".join(text.split()))
    end, kind = len(flags) - flags[::-1].index(found[1]), named(kinds[found[1]])
    given = " ".join(takewhile(lambda part: not part.startswith("--"), parts[end:]))
    return f"{found[1]} must be {kind}, got {quote(given)}" if given else f"{found[1]} needs {kind} behind it"


def help_text(usage: str, about: str, record: Any, full: bool = False) -> str:
    """A line for each option, in groups; the value behind a name is its default.

    Without `full` two kinds of options are listed at the end and not explained: those of nested records, with
    a dot in their names, and those of ppo, whose help begins so, where the objective is another.
    """
    width, found = min(120, shutil.get_terminal_size().columns), list(options(record))
    left = min(30, 4 + max(len(option.flag) for option in found if "." not in option.flag.split()[0]))
    ppo = getattr(getattr(record, "srrl", None), "objective", "ppo") == "ppo"
    groups: dict[str, list[str]] = {}  # those that are explained
    brief: dict[str, str] = {}  # their flags; a name stays with its default
    for group, flag, said, *_ in found:
        other = not ppo and said.startswith("ppo: ")
        if not full and (other or "." in flag.split()[0]):
            group = "with --objective ppo" if other else group
            brief[group] = brief.get(group, f"{group}:") + "  " + flag.replace(" ", "\0")
        else:
            text = f"{f'  {flag}  ':{left}}{said}"
            groups.setdefault(group, [f"{group}:"]).extend(wrap(text, width, subsequent_indent=" " * left))
    lines = [f"usage: {usage}", *wrap(about, width), *(line for group in groups.values() for line in group)]
    for text in brief.values():
        wrapped = wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
        lines += [line.replace("\0", " ") for line in wrapped]
    return "\n".join(lines)
