"""What an option may be, stated once beside its field and checked when the record is made.

    @dataclass(frozen=True)
    class Example(Checked):
        # denoising steps
        steps: Count = 20
        # share of new noise
        fresh_noise: Share = 0.0

Example(steps=0) raises ValueError: steps must be at least 1, got 0.
"""

import math
import typing
from typing import Annotated, Literal, NamedTuple


class Range(NamedTuple):
    """The finite numbers from `low` to `high`; without `low` itself if `above`."""

    low: float
    high: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        inside = self.low < value if self.above else self.low <= value
        return inside and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "a finite number"
        if self.high == math.inf:
            return f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return f"in {'(' if self.above else '['}{self.low:g}, {self.high:g}]"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]  # 0 is allowed
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]
Finite = Annotated[float, Range(-math.inf)]
Positive = Annotated[float, Range(0, above=True)]


class Checked:
    """A dataclass whose fields carry ranges or name their values.  Raises ValueError on any other value."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            hints = [hint, *typing.get_args(hint)]  # `Count | None` keeps the range inside
            marks = [mark for h in hints for mark in getattr(h, "__metadata__", ())]
            ranges = [mark for mark in marks if isinstance(mark, Range)]
            value = getattr(self, name)
            known = next((typing.get_args(h) for h in hints if typing.get_origin(h) is Literal), (value,))
            if value is not None and value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value}")
            for number in value if isinstance(value, tuple) else [value]:
                if ranges and number is not None and not ranges[0].holds(number):
                    raise ValueError(f"{name} must be {ranges[0]}, got {number}")
