"""What is selected, as the query of the page's address: a view that can be sent, kept and gone back to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlencode


@dataclass(frozen=True)
class Query:
    """The keys of an address and their values, in order; what a key may hold is up to the page."""

    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def value(self, key: str, default: str = "") -> str:
        """The first value of a key."""
        return next(iter(self.values.get(key, ())), default)

    def many(self, key: str) -> tuple[str, ...]:
        """All values of a key."""
        return tuple(self.values.get(key, ()))

    def span(self, key: str) -> tuple[float, float] | None:
        """The two ends of a range such as `3-17`; None when there is none, or it cannot be read."""
        low, dash, high = self.value(key).partition("-")
        try:
            return (float(low), float(high)) if dash else (float(low), float(low))
        except ValueError:
            return None

    def with_changes(self, **changes: str | Iterable[str] | None) -> "Query":
        """The query with some keys changed; None or nothing removes a key."""
        values = dict(self.values)
        for key, value in changes.items():
            texts = () if value is None else (value,) if isinstance(value, str) else tuple(value)
            if texts:
                values[key] = texts
            else:
                values.pop(key, None)
        return Query(values)

    @property
    def search(self) -> str:
        """The query as it stands in an address, with its `?`."""
        return "?" + urlencode([(key, value) for key, values in self.values.items() for value in values])


def parse(search: str | None) -> Query:
    """The query of an address; more fields than any page asks for are cut off."""
    values: dict[str, list[str]] = {}
    for key, value in parse_qsl((search or "").removeprefix("?"), keep_blank_values=True)[:200]:
        values.setdefault(key, []).append(value)
    return Query({key: tuple(texts) for key, texts in values.items()})


def link(**values: str | Iterable[str] | None) -> str:
    """The address, within the app, of what these keys select."""
    return Query().with_changes(**values).search
