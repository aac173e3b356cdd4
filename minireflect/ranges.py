"""What a value may be: its type and range, stated once beside a field and checked when a record is made.

    @dataclass(frozen=True)
    class Example(Checked):
        # denoising steps
        steps: Count = 20
        # share of new noise
        fresh_noise: Share = 0.0

Example(steps=0) raises ValueError: steps must be at least 1, got 0.  `expect` checks what comes from a file.
"""

import inspect
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

QUOTED, LINE, MESSAGE = 60, 300, 2_000  # characters of a quotation, of a line, of all lines of a message
LARGEST = 3.4028235e38  # of float32, in which all is computed
T = TypeVar("T")


# --- messages -----------------------------------------------------------------------------------------------
def quote(value: object) -> str:
    """A value in a message: at most about 60 characters, control characters escaped."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = QUOTED
    try:
        return short.repr(value).replace("\n", " ")
    except ValueError:  # of an integer with thousands of digits
        return f"a {type(value).__name__} too long to print"


def plain(message: str) -> str:
    """A message that is safe to print: no control characters, no long line, not too many lines."""
    lines = message[: 10 * MESSAGE].split("\n")
    safe = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in _middle(line, LINE)) for line in lines]
    text = "\n".join(_middle(line, LINE) for line in safe)
    return text if len(text) <= MESSAGE else text[:MESSAGE] + " ..."


def _middle(text: str, limit: int) -> str:
    """The text without its middle, if it is longer than the limit."""
    return text if len(text) <= limit else f"{text[: limit // 2 - 3]} ... {text[2 - limit // 2 :]}"


class Refusal(ValueError):
    """What was given cannot be used; the message is one sentence for the user, and a list below it."""

    def __init__(self, message: str) -> None:
        super().__init__(plain(message))


def all_finite(values: T) -> bool:
    """Whether all numbers of a tensor are finite; those of one byte always are for torch."""
    if not values.numel() or values.itemsize == 1:
        return True
    least, most = values.aminmax()  # of NaN both are; thirty times as fast as asking each number
    return bool(least.isfinite() & most.isfinite())


def finite(values: T, what: str) -> T:
    """The tensor itself.  Raises FloatingPointError when one of its numbers is not finite."""
    if not all_finite(values):
        raise FloatingPointError(f"{what} is not a finite number")
    return values


# --- types and ranges ---------------------------------------------------------------------------------------
class Range(NamedTuple):
    """The finite numbers from `low` to `high`; without `low` itself if `above`."""

    low: float
    high: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "a finite number"
        if self.high == math.inf:
            return f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return f"in {'(' if self.above else '['}{self.low:g}, {self.high:g}]"


class Dense(NamedTuple):
    """Tensors of floating-point numbers, of one dimension or more."""

    def holds(self, value: Any) -> bool:
        return value.is_floating_point() and value.ndim > 0 and "strided" in str(value.layout)

    def __str__(self) -> str:
        return "a dense tensor of floating-point numbers"


Count = Annotated[int, Range(1)]
Several = Annotated[int, Range(2)]
Natural = Annotated[int, Range(0)]  # 0 is allowed
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]
Finite = Annotated[float, Range(-math.inf)]
Positive = Annotated[float, Range(0, above=True)]
Size = Annotated[int, Range(1, 1 << 20)]  # of a network: what a file may ask for
Depth = Annotated[int, Range(0, 1_000)]  # of a network: layers

NAMES = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "an object",
    list: "a list", tuple: "a list", types.NoneType: "null", Path: "a path", Callable: "a function",
}  # fmt: skip


def named(hint: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(named, inner))
    if origin is Annotated:
        ranges = [str(mark) for mark in inner[1:] if isinstance(mark, Range) and mark.low > -math.inf]
        return " ".join([named(inner[0]), *ranges])
    if origin is tuple:
        return f"a list, each {named(inner[0])}" if ... in inner else f"a list of {len(inner)}"
    return NAMES.get(dict if typing.is_typeddict(origin) else origin, f"a {origin.__name__}")


def _is(value: object, kind: type) -> bool:
    """Whether a value is of a plain type: true is no number, a whole number is one, and all are finite."""
    if kind is int or (kind is float and isinstance(value, int)):
        most = 1 << 63 if kind is int else LARGEST
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < most
    return isinstance(value, kind)


def expect(value: object, hint: Any, where: str) -> Any:
    """The value, a list as a tuple where that is meant.

    Raises Refusal, which begins with `where`, when it is not of the type `hint`, or not in its range.
    """
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint in (Any, object):
        return value
    if isinstance(value, numbers.Number) and hasattr(value, "item"):
        value = value.item()  # of numpy
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in inner:
            return None
        kinds = [kind for kind in inner if kind is not types.NoneType]
        if len(kinds) == 1:  # names the range
            return expect(value, kinds[0], where)
        for kind in kinds:
            with suppress(Refusal):
                return expect(value, kind, where)
    elif origin is Annotated:
        value = expect(value, inner[0], where)
        for mark in inner[1:]:
            if hasattr(mark, "holds") and not mark.holds(value):
                raise Refusal(f"{where} must be {mark}, got {quote(value)}")
        return value
    elif origin is Literal:
        if value in inner:
            return value
        said = value if isinstance(value, str) and value.isidentifier() else quote(value)
        raise Refusal(f"{where} must be one of {', '.join(map(str, inner))}, got {said}")
    elif origin in (tuple, list) and isinstance(value, list | tuple):
        kinds = inner if origin is tuple and ... not in inner else (inner[:1] or (Any,)) * len(value)
        if len(kinds) == len(value):
            return origin(expect(v, kind, f"{where}[{i}]") for i, (v, kind) in enumerate(zip(value, kinds)))
    elif origin is dict or typing.is_typeddict(origin):
        known, other = {} if origin is dict else hints(origin), inner[1] if inner else Any
        if isinstance(value, dict):
            return {k: expect(v, known.get(k, other), f"{where}.{k}"[:QUOTED]) for k, v in value.items()}
    elif isinstance(origin, type) and _is(value, origin):
        if origin is float and not abs(value) <= LARGEST:  # nan is not
            raise Refusal(f"{where} must be a finite number of float32, got {value}")
        return value
    raise Refusal(f"{where} must be {named(hint)}, got {quote(value)}")


@lru_cache
def hints(record: type | Callable) -> dict[str, Any]:
    """The types of the fields of a dataclass or a TypedDict, or of the arguments of a function, by name."""
    return typing.get_type_hints(record, include_extras=True)


def checked(call: T) -> T:
    """A function that raises Refusal on an argument that is not of its type, see `expect`."""
    signature = inspect.signature(call)

    @wraps(call)
    def checking(*given: object, **named: object) -> object:
        bound = signature.bind(*given, **named)
        for name, value in bound.arguments.items():
            bound.arguments[name] = expect(value, hints(call).get(name, Any), name)
        return call(*bound.args, **bound.kwargs)

    return checking


class Checked:
    """A dataclass whose fields are checked against their types and ranges; then `require`, where the class or
    a parent has one, checks them against each other.  Raises ValueError.
    """

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            object.__setattr__(self, name, expect(getattr(self, name), hint, name))
        for record in reversed(type(self).__mro__):
            if "require" in vars(record):
                record.require(self)
