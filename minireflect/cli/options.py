"""The options of a record, and their help: a line each, with the default beside the name and the comment above the field."""

import inspect
import itertools
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


def help_text(usage: str, about: str, record: Any, titles: dict[str, str], full: bool = False) -> str:
    """A line for each option, in groups; the value behind a name is its default.

    Options of nested records, those with a dot in their names, are listed without their help unless `full`.  `titles` of
    records that are not called as their field.
    """
    width, found = min(120, shutil.get_terminal_size().columns), list(options(record))
    left = min(30, 4 + max(len(option.flag) for option in found))
    lines = [f"usage: {usage}", *textwrap.wrap(about, width)]
    for title, group in itertools.groupby(found, lambda option: titles.get(option.group, option.group)):
        lines.append(f"{title}:")
        rows = list(group)
        if "." in rows[0].flag and not full:
            flags = "  ".join(
                option.flag.replace(" ", "\0") for option in rows
            )  # a name stays with its default
            lines += [
                line.replace("\0", " ")
                for line in textwrap.wrap(flags, width, initial_indent="  ", subsequent_indent="  ")
            ]
            continue
        for option in rows:
            flag = f"  {option.flag}  "
            said = textwrap.wrap(
                option.help, width, initial_indent=f"{flag:{left}}", subsequent_indent=" " * left
            )
            lines += said or [flag]
    return "\n".join(lines)
