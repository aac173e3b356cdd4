"""The options of a record, and their help: a line each, with the default beside the name and the comment above the field."""

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
HELP = ("-h", "--help")


class Option(NamedTuple):
    group: str  # the record's title
    flag: str  # as typed, with the default behind it
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
        flag, about = f"--{prefix}{kebab(field.name)}", said.get(field.name, "")
        kinds = (
            [kind for kind in typing.get_args(hint) if kind is not type(None)] if value is None else [hint]
        )
        if typing.get_origin(kinds[0]) is Literal:
            about = f"{'|'.join(map(str, typing.get_args(kinds[0])))}: {about}"
        if tyro.conf.Positional in getattr(hint, "__metadata__", ()):
            flag = f"{field.name.upper()} ..."
        elif isinstance(value, bool):
            flag = f"--{prefix}no-{kebab(field.name)}" if value else flag
        elif value is None:
            flag += f" {METAVARS.get(kinds[0], 'NAME')}"
        else:
            flag += f" {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        yield Option(group, flag, about, (home, field.name))
    for value, inner, name in nested:
        yield from options(value, inner, name)


def kebab(field: str) -> str:
    return field.replace("_", "-")


def help_text(usage: str, about: str, record: Any, titles: dict[str, str]) -> str:
    """A line for each option, in groups; the value behind a name is its default.  `titles` of records that need one."""
    width = min(120, shutil.get_terminal_size().columns)
    rows = list(options(record))
    left = min(30, 4 + max(len(o.flag) for o in rows))
    lines, group = [f"usage: {usage}", *textwrap.wrap(about, width)], None
    for option in rows:
        if titles.get(option.group, option.group) != group:
            group = titles.get(option.group, option.group)
            lines.append(f"{group}:")
        flag = f"  {option.flag}"
        said = textwrap.wrap(option.help, width - left) or [""]
        if len(flag) + 2 > left and len(flag) + 2 + len(option.help) <= width:
            lines.append(f"{flag}  {option.help}")
            continue
        if len(flag) + 2 > left:
            lines.append(flag)
            flag = ""
        lines += [f"{flag:{left}}{said[0]}", *(" " * left + more for more in said[1:])]
    return "\n".join(lines)
