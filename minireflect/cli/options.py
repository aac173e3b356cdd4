"""The options of a record and their help: name, default, and the comment above the field."""

import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

METAVARS = {Path: "PATH", int: "N", float: "X"}
HELP, HELP_ALL = ("-h", "--help", "--help-all"), "--help-all"


class Option(NamedTuple):
    group: str  # the record's title
    flag: str  # as typed, with the default behind it
    choices: str  # "a|b: ", or nothing
    help: str
    field: tuple[type, str]  # where it is defined


def comments(record: type) -> dict[str, str]:
    """The comment above each field of a dataclass, or else the one behind it."""
    found: dict[str, str] = {}
    for owner in reversed([c for c in record.__mro__ if is_dataclass(c)]):
        above: list[str] = []
        for line in inspect.getsource(owner).splitlines():
            line = line.strip()
            if line.startswith("#"):
                above.append(line.lstrip("# "))
                continue
            if field := re.match(r"(\w+): ", line):
                found[field[1]] = " ".join(above) or line.partition("  # ")[2]
            above = []
    return found


def options(record: Any, prefix: str = "", group: str = "options") -> Iterator[Option]:
    """Every option of a record with its defaults, those of nested records last."""
    home = getattr(record, "SOURCE", type(record))  # `options_of` takes fields from another record
    hints, said, nested = typing.get_type_hints(type(record), include_extras=True), comments(home), []
    for field in fields(record):
        value, hint = getattr(record, field.name), hints[field.name]
        if is_dataclass(value):
            flat = any(getattr(mark, "name", None) == "" for mark in getattr(hint, "__metadata__", ()))
            nested.append((value, prefix if flat else f"{prefix}{kebab(field.name)}.", field.name))
            continue
        flag, choices = f"--{prefix}{kebab(field.name)}", ""
        kinds = (
            [kind for kind in typing.get_args(hint) if kind is not type(None)] if value is None else [hint]
        )
        if typing.get_origin(kinds[0]) is Literal:
            choices = f"{'|'.join(map(str, typing.get_args(kinds[0])))}: "
        if tyro.conf.Positional in getattr(hint, "__metadata__", ()):
            flag = f"{field.name.upper()} ..."
        elif isinstance(value, bool):
            flag = f"--{prefix}no-{kebab(field.name)}" if value else flag
        elif value is None:
            flag += f" {METAVARS.get(kinds[0], 'NAME')}"
        else:
            flag += f" {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        yield Option(group, flag, choices, said.get(field.name, ""), (home, field.name))
    for value, inner, name in nested:
        yield from options(value, inner, name)


def kebab(field: str) -> str:
    return field.replace("_", "-")


def help_text(usage: str, about: str, record: Any, titles: dict[str, str], full: bool = False) -> str:
    """A line for each option, in groups; the value behind a name is its default.

    Without `full` two kinds of options are listed at the end and not explained: those of nested records, with
    a dot in their names, and those of another objective, whose help begins with its name.  `titles` of
    records that need another than their field's.
    """
    width, found = min(120, shutil.get_terminal_size().columns), list(options(record))
    left = min(30, 4 + max(len(option.flag) for option in found if "." not in option.flag.split()[0]))
    other = {"regress": "ppo: ", "ppo": "regress: "}.get(
        getattr(getattr(record, "srrl", None), "objective", ""), "\0"
    )
    brief: dict[str, list[str]] = {}
    lines, title = [f"usage: {usage}", *textwrap.wrap(about, width)], ""
    for option in found:
        group = titles.get(option.group, option.group)
        if not full and option.help.startswith(other):
            group = f"with --objective {other[:-2]}"
        if not full and ("." in option.flag.split()[0] or group.startswith("with")):
            brief.setdefault(group, []).append(
                option.flag.replace(" ", "\0")
            )  # a name stays with its default
            continue
        lines += [f"{group}:"] * (group != title)
        title, flag = group, f"  {option.flag}  "
        lines += textwrap.wrap(
            option.choices + option.help, width, initial_indent=f"{flag:{left}}", subsequent_indent=" " * left
        ) or [flag]
    for group, flags in brief.items():
        text = f"{group}: " + "  ".join(flags)
        lines += [line.replace("\0", " ") for line in textwrap.wrap(text, width, subsequent_indent="  ")]
    return "\n".join(lines)
