"""How long work reports how far it is."""

from collections.abc import Callable
from typing import TypeAlias

# Called with (done, total, what).
Progress: TypeAlias = Callable[[int, int, str], None]
