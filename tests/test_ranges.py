"""Ranges beside fields: each record names the value that is outside."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch

from minireflect.ranges import Checked, Count, Natural, Positive, Share, Weight


@dataclass(frozen=True)
class Record(Checked):
    steps: Count = 20
    rounds: Natural = 0
    share: Share = 0.5
    weight: Weight = 0.0
    lr: Positive = 1e-3
    size: Count | None = None
    suffixes: tuple[Count, ...] = ()
    name: str = "x"
    mode: Literal["fast", "exact"] = "fast"


def test_values_inside_their_range_pass() -> None:
    Record(), Record(1, 0, 0.0, 1e9, 1e-30, 8, (1, 5)), Record(share=1.0)


def test_numbers_of_numpy_and_torch_pass_as_those_of_python() -> None:
    record = Record(np.int64(3), torch.tensor(1), share=np.float32(0.5), name=np.str_("y"))
    assert record == Record(3, 1, share=0.5, name="y") and type(record.steps) is int
    with pytest.raises(ValueError, match=r"steps must be a whole number, got 3\.0"):
        Record(np.float64(3))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("rounds", -1, "rounds must be at least 0, got -1"),
        ("share", 1.01, r"share must be in \[0, 1\], got 1.01"),
        ("weight", math.nan, "weight must be a finite number of float32, got nan"),
        ("weight", math.inf, "weight must be a finite number of float32, got inf"),
        ("weight", 1e39, r"weight must be a finite number of float32, got 1e\+39"),
        ("lr", 0.0, "lr must be above 0, got 0.0"),
        ("size", 0, "size must be at least 1, got 0"),
        ("mode", "Fast", "mode must be one of fast, exact, got 'Fast'"),
        ("suffixes", (1, 0), r"suffixes\[1\] must be at least 1, got 0"),
    ],
)
def test_a_value_outside_is_named_with_its_range(field: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(Record(), **{field: value})


def test_what_fields_require_of_each_other_holds_for_every_parent() -> None:
    @dataclass(frozen=True)
    class Parent(Checked):
        low: int = 0

        def require(self) -> None:
            if self.low > 9:
                raise ValueError("low is above 9")

    @dataclass(frozen=True)
    class Child(Parent):
        high: int = 20

        def require(self) -> None:
            if self.high < self.low:
                raise ValueError("high is below low")

    assert Child(3, 4).high == 4
    for values, said in (
        ((10, 20), "low is above 9"),
        ((3, 2), "high is below low"),
        ((0.5, 2), "whole number"),
    ):
        with pytest.raises(ValueError, match=said):
            Child(*values)
