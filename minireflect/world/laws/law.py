"""What a law of this world is: a table of object combinations, the lawful outcome of each, the words, and a drawing."""

from abc import ABC, abstractmethod

from ..pen import Pen
from ..scenes import Object

BIG, SMALL = 8.5, 5.5  # radius in pixels of big and small things


class Law(ABC):
    """The interface of a law.  `outcomes` are all that a picture can show, lawful or not."""

    name: str
    outcomes: tuple[str, ...]
    defied: str  # how an unlawful outcome is announced: "against gravity"

    @abstractmethod
    def combinations(self) -> list[tuple[Object, ...]]:
        """Every set of objects that this law can be shown with, in a fixed order."""

    @abstractmethod
    def lawful(self, objects: tuple[Object, ...]) -> str:
        """The one outcome that nature would give."""

    @abstractmethod
    def setting(self, objects: tuple[Object, ...]) -> str:
        """The scene in words, its outcome left open."""

    @abstractmethod
    def result(self, objects: tuple[Object, ...], outcome: str) -> str:
        """The outcome in words, after a comma."""

    @abstractmethod
    def because(self, objects: tuple[Object, ...]) -> str:
        """Why the lawful outcome is lawful, in one sentence without a full stop."""

    @abstractmethod
    def triples(self, objects: tuple[Object, ...], outcome: str) -> list[tuple[str, str, str]]:
        """(subject, relation, object) triples that hold in the picture."""

    @abstractmethod
    def draw(self, pen: Pen, objects: tuple[Object, ...], outcome: str) -> None: ...

    def possible(self, objects: tuple[Object, ...]) -> tuple[str, ...]:
        """The outcomes that a picture of these objects can show."""
        return self.outcomes

    def unlawful(self, objects: tuple[Object, ...]) -> list[str]:
        return [o for o in self.possible(objects) if o != self.lawful(objects)]
