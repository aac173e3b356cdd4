"""Types and ranges of values: stated once, in the type of a field, and checked when the record is created.

    @dataclass(frozen=True)
    class Example(Checked):
        # denoising steps
        steps: Count = 20
        # share of new noise
        fresh_noise: Share = 0.0

Example(steps=0) raises ValueError: steps must be at least 1, got 0.  `expect` checks a value from a file.
"""

import math
import reprlib
import types
import typing
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

# most characters of a quoted value, of a line of a message, and of a whole message
QUOTED, LINE, MESSAGE = 60, 300, 2_000
LARGEST = 3.4028235e38  # largest float32: networks and samplers compute in float32
T = TypeVar("T")


# --- messages -----------------------------------------------------------------------------------------------
def quote(value: object) -> str:
    """The text of a value for a message, at most about 60 characters, with control characters escaped."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = QUOTED
    try:
        return short.repr(value).replace("\n", " ")
    except ValueError:  # Python does not print integers with thousands of digits
        return f"a {type(value).__name__} too long to print"


def plain(message: str) -> str:
    """The message without control characters, cut to lines of LINE and a total of MESSAGE characters."""
    lines = message[: 10 * MESSAGE].split("\n")
    safe = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in _middle(line, LINE)) for line in lines]
    text = "\n".join(_middle(line, LINE) for line in safe)
    return text if len(text) <= MESSAGE else text[:MESSAGE] + " ..."


def _middle(text: str, limit: int) -> str:
    """The text; if it is longer than `limit`, its middle is replaced by "..."."""
    return text if len(text) <= limit else f"{text[: limit // 2 - 3]} ... {text[2 - limit // 2 :]}"


class Refusal(ValueError):
    """An input that cannot be used. The message is one sentence for the user, sometimes with a list below."""

    def __init__(self, message: str) -> None:
        super().__init__(plain(message))


def all_finite(values: T) -> bool:
    """Whether all numbers of a tensor are finite."""
    if not values.numel() or not (values.is_floating_point() or values.is_complex()):
        return True
    values = values.bfloat16() if values.itemsize == 1 else values  # exact; float8 has no aminmax
    least, most = values.aminmax()  # NaN if any number is NaN; thirty times as fast as values.isfinite()
    return bool(least.isfinite() & most.isfinite())


def finite(values: T, what: str) -> T:
    """Return the tensor.  Raises FloatingPointError if one of its numbers is not finite."""
    if not all_finite(values):
        raise FloatingPointError(f"{what} is not a finite number")
    return values


# --- types and ranges ---------------------------------------------------------------------------------------
class Range(NamedTuple):
    """The numbers from `low` to `high`, both included; with `above=True` `low` itself is excluded."""

    low: float
    high: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return f"in {'(' if self.above else '['}{self.low:g}, {self.high:g}]"


Count = Annotated[int, Range(1)]
Several = Annotated[int, Range(2)]
Natural = Annotated[int, Range(0)]  # 0 is allowed
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]
Finite = float  # `expect` refuses every float that is not finite
Positive = Annotated[float, Range(0, above=True)]
Size = Annotated[int, Range(1, 1 << 20)]  # a width of a network; the limit guards against damaged files
Depth = Annotated[int, Range(0, 1_000)]  # a number of layers

NAMES = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "an object",
    list: "a list", tuple: "a list", types.NoneType: "null", Path: "a path",
}  # fmt: skip


def named(hint: Any) -> str:
    """A type in words, for a message: `Count` is "a whole number at least 1"."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(named, inner))
    if origin is Annotated:
        return " ".join([named(inner[0]), *(str(mark) for mark in inner[1:] if isinstance(mark, Range))])
    if origin is tuple:
        return f"a list, each {named(inner[0])}" if ... in inner else f"a list of {len(inner)}"
    return NAMES.get(dict if typing.is_typeddict(origin) else origin, getattr(origin, "__name__", "another"))


def _is(value: object, kind: type) -> bool:
    """Whether a value is of a plain type. An int also counts as a float; a bool does not count as an int."""
    if kind in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < (1 << 63 if kind is int else LARGEST)
    return isinstance(value, kind)


def expect(value: object, hint: Any, where: str) -> Any:
    """Check the type and range of a value.  -> the value; a list becomes a tuple if `hint` is a tuple

    Raises Refusal, whose message begins with `where`, if the value has another type or is out of range.
    """
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    value = value.item() if getattr(value, "ndim", None) == 0 else value  # of numpy or torch
    if hint in (Any, object):
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in inner:
            return None
        kinds = [kind for kind in inner if kind is not types.NoneType]
        if len(kinds) == 1:  # the error of the only type is more specific
            return expect(value, kinds[0], where)
        for kind in kinds:
            with suppress(Refusal):
                return expect(value, kind, where)
    elif origin is Annotated:
        value = expect(value, inner[0], where)
        for mark in inner[1:]:
            if isinstance(mark, Range) and not mark.holds(value):
                raise Refusal(f"{where} must be {mark}, got {value}")
        return value
    elif origin is Literal:
        if value in inner:
            return value
        raise Refusal(f"{where} must be one of {', '.join(map(str, inner))}, got {quote(value)}")
    elif origin in (tuple, list) and isinstance(value, list | tuple):
        kinds = inner if origin is tuple and ... not in inner else (inner[:1] or (Any,)) * len(value)
        if len(kinds) == len(value):
            return origin(expect(v, kind, f"{where}[{i}]") for i, (v, kind) in enumerate(zip(value, kinds)))
    elif origin is dict or typing.is_typeddict(origin):
        kinds, rest = {} if origin is dict else hints(origin), inner[1] if inner else Any
        if isinstance(value, dict):
            places = {k: _middle(f"{where}.{k}", 2 * QUOTED) for k in value}
            return {k: expect(v, kinds.get(k, rest), places[k]) for k, v in value.items()}
    elif isinstance(origin, type) and _is(value, origin):
        if origin is float and not abs(value) <= LARGEST:  # also true for NaN
            raise Refusal(f"{where} must be a finite number of float32, got {value}")
        return value
    raise Refusal(f"{where} must be {named(hint)}, got {quote(value)}")


@lru_cache
def hints(record: type) -> dict[str, Any]:
    """The types of the fields of a dataclass or a TypedDict, by name."""
    return typing.get_type_hints(record, include_extras=True)


class Checked:
    """Base of dataclasses whose fields are checked against their types and ranges when a record is created.

    Then the `require` methods of the class and its parents check the fields against each other. Raises
    ValueError.
    """

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            object.__setattr__(self, name, expect(getattr(self, name), hint, name))
        for record in reversed(type(self).__mro__):
            if "require" in vars(record):
                record.require(self)
