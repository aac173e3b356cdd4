"""The command line: the list of trainings, options made from dataclasses, their help and error messages.

An option is a field of a dataclass; its help is the comment above the field. This file does not import torch.
"""

import difflib
import inspect
import io
import re
import shutil
import typing
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, suppress
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
TRAINED = {  # commands of `train`, and their minutes with the preset cpu on two cores
    "srrl": ("a diffusion model by SRRL, DDPO or GRPO; with --base a LoRA", 6),
    "all": ("autoencoder, diffusion, reward and srrl; with --scenes graphs all of RL-RIG", 85),
    "autoencoder": ("the autoencoder: pictures to latents and back", 13),
    "diffusion": ("the base: a diffusion model from prompts to latents", 25),
    "reward": ("the learned reward: does the picture fit the prompt?", 35),
    "rlrig": ("RL-RIG by reinforcement learning: the Actor, then the editor", 13),
    "checker": ("RL-RIG's Checker, and the judge that is used only to measure", 25),
    "actor": ("RL-RIG's Actor by imitation: which edit does the picture need?", 13),
    "reason-grpo": ("ReasonGen-R1 by reinforcement learning: rationale and picture", 17),
    "reason-sft": ("ReasonGen-R1 by fine-tuning on true rationales", 45),
    "vq": ("the codebook of image tokens", 11),
    "captioner": ("the captioner: does the picture show the rationale?", 11),
}
HELP = {"-h", "--help"}
MINUTES = """\
Minutes are approximate, for the preset cpu on two cores. `minireflect train COMMAND --help` lists
the options of a command. Without COMMAND, srrl is trained from the shipped weights."""
# fmt: on
NO_MEMORY = "out ?of ?memory|memoryerror|can't allocate memory|not enough memory|alloc_failed"
SMALLER = """out of memory; with --base try --micro-batch 1, --checkpointing, --precision bf16 or a
smaller --size, otherwise a smaller --batch""".replace("\n", " ")
PICTURES = (".png", ".jpg", ".jpeg")  # file names of pictures
METAVARS = {Path: "PATH", int: "N", float: "X"}


def train_help() -> str:
    """The help of `minireflect train`: one line per command."""
    rows = [f"  {name:11}  {about} ({minutes} min)" for name, (about, minutes) in TRAINED.items()]
    return "\n".join(["usage: minireflect train [COMMAND] [OPTIONS]", "", *rows, "", MINUTES])


def absent(what: str, name: str, names: Iterable[str]) -> str:
    """The first part of an error about an unknown command or option, with the most similar known name."""
    near = difflib.get_close_matches(name[:40].lower(), names, 1)
    return f"there is no {what} {quote(name)}" + (f" (did you mean {near[0]}?)" if near else "")


def known(name: str, names: Iterable[str]) -> None:
    """Raises ValueError if the command does not exist."""
    if name not in names:
        raise ValueError(f"{absent('command', name, names)}; the commands are {', '.join(names)}")


def check_effect(given: Iterable[str], idle: dict[str, Iterable[str]]) -> None:
    """Raises ValueError if a given option has no effect.  `idle` has the names of such options by reason."""
    for why, names in idle.items():
        if unread := sorted({*given} & {*names}):
            flags = ", ".join(f"--{name.partition('.')[2] or name}" for name in unread).replace("_", "-")
            raise ValueError(f"{flags} has no effect {why}{'' if ';' in why else '; leave it out'}")


def lacks_memory(error: BaseException) -> bool:
    said = f"{type(error).__name__} {error}"
    return not isinstance(error, ValueError) and bool(re.search(NO_MEMORY, said, re.IGNORECASE))


def sentence(error: BaseException) -> str:
    """The message of an error, as one sentence that is safe to print."""
    if isinstance(error, OSError) and error.strerror:
        where = f" {quote(str(error.filename))}" if error.filename else " the disk or the output"
        return f"cannot use{where}: {error.strerror.lower()}"
    if lacks_memory(error):
        return plain(f"{SMALLER} ({str(error).partition(chr(10))[0] or 'MemoryError'})")
    return plain(str(error)) or type(error).__name__


def refuse(message: str) -> None:
    """Replaces `ArgumentParser.error`, which would print several lines and exit."""
    raise Refusal(message)


class Option(NamedTuple):
    """An option as --help shows it."""

    group: str  # heading in the help: the name of the record that has the field
    flag: str  # as typed, followed by its default
    help: str  # the comment above the field, and the choices
    kind: Any  # the type of the value


@lru_cache
def comments(record: type) -> dict[str, str]:
    """The comment above each field of a dataclass, including inherited fields."""
    sources = map(inspect.getsource, record.__mro__[-2::-1])  # without `object`; a subclass replaces comments
    found = re.findall(r"((?: +# .*\n)+) +(\w+): ", "".join(sources))
    return {name: " ".join(re.findall("# (.*)", above)) for above, name in found}


def options(record: Any, prefix: str = "", group: str = "run") -> Iterator[Option]:
    """The options of a record, those of nested records last, without fields marked with tyro's Suppress."""
    home = getattr(record, "SOURCE", type(record))  # records of `config.options_of` have fields of Config
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
            shown = f"{flag.upper()} ..." if Positional in marks else typed(flag, value, kind)
            yield Option(group, shown, comments(home).get(name, "") + choices, kind)
    for value, inner, name in nested:
        yield from options(value, inner, name)


def typed(flag: str, value: object, kind: type) -> str:
    """An option as typed, followed by its default, or by a placeholder such as PATH if it has none."""
    if isinstance(value, bool):
        head, dot, name = flag.rpartition(".")
        return f"--{head}{dot}no-{name}" if value else f"--{flag}"
    shown = METAVARS.get(kind, "NAME") if value is None else value
    return f"--{flag} {' '.join(map(str, shown)) if isinstance(shown, tuple) else shown}"


def read(words: list[str], command: str, about: str, default: Any) -> Any:
    """The record `default` changed by the options in `words`.

    Prints the help and exits if `words` ask for it. Raises Refusal on an option that is not valid.
    """
    if {*HELP, "--help-all"} & {*words}:
        about += " The value after a name is its default; --help-all explains every option."
        print(help_text(f"minireflect {command} [OPTIONS]", about, default, full="--help-all" in words))
        raise SystemExit(0)
    said, record, left = io.StringIO(), None, []
    # `help_text` below replaces tyro's help
    how = {"default": default, "return_unknown_args": True, "config": (tyro.conf.HelptextFromCommentsOff,)}
    with redirect_stderr(said), suppress(SystemExit):
        record, left = tyro.cli(type(default), args=words, **how)
    if record is None or left:
        raise Refusal(misread(words, left, said.getvalue(), f"minireflect {command}", default))
    return record


def misread(words: list[str], left: list[str], said: str, command: str, record: Any) -> str:
    """The message about words that tyro refused: `left` are unknown words, `said` is tyro's own message."""
    name = partial(re.sub, r"^--(.*\.)?no-", r"--\1")  # --no-controls is an option of the name --controls
    kinds = {name(option.flag.split()[0]): option.kind for option in options(record)}
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    flags = [name(part.replace("_", "-")) for part in parts]
    if left and re.match("-+[^-0-9.]", left[0]):
        return f"{absent('option', left[0].partition('=')[0], kinds)}; {command} --help lists the options"
    if left:
        after = next((f" after {flag}" for flag in flags[parts.index(left[0]) :: -1] if flag in kinds), "")
        return f"{quote(left[0])} is not expected{after}; {command} --help lists the options"
    text = re.sub("[│╭╮╰╯─]+|-{3,}", " ", said)  # without the frame that tyro draws
    found = re.search(r"(?:parsing|argument')(--[\w.-]+)", "".join(text.split()))
    if not found or found[1] not in kinds:
        return re.sub(r"^.*Error parsing [\w.]+: | For full helptext.*$", "", " ".join(text.split()))
    end, kind = len(flags) - flags[::-1].index(found[1]), named(kinds[found[1]])
    given = " ".join(takewhile(lambda part: not part.startswith("--"), parts[end:]))
    return f"{found[1]} must be {kind}, got {quote(given)}" if given else f"{found[1]} needs {kind} after it"


def help_text(usage: str, about: str, record: Any, full: bool = False) -> str:
    """The help of a command: one line per option, in groups.

    Without `full`, two kinds of options are only listed at the end, without explanations: options of nested
    records (with a dot in the name), and options of the objective ppo (their help begins with "ppo: ") if the
    objective is another one.
    """
    width, found = min(120, shutil.get_terminal_size().columns), list(options(record))
    left = min(30, 4 + max(len(option.flag) for option in found if "." not in option.flag.split()[0]))
    ppo = getattr(getattr(record, "srrl", None), "objective", "ppo") == "ppo"
    groups: dict[str, list[str]] = {}  # lines of the explained options
    brief: dict[str, str] = {}  # flags of the others; "\0" keeps a name and its default on one line
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
        lines += wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")
