"""What a page is: its name, when it is linked, what it shows, and its callbacks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dashboard.components.parts import Content as Content
from dashboard.state.view import Site, View

if TYPE_CHECKING:
    import dash


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        name: the value of `page` in its address.
        title: the text of links to it.
        of: whether it shows one audit, one series, or all of them.
        layout: builds its content for a view.
        identity: keys of the query that make it a different page. A change of any other key leaves the page
            in place and reaches its callbacks through the address.
        linked: whether the navigation links it from a view.
        callbacks: adds its callbacks to the app, once.
    """

    name: str
    title: str
    of: Literal["audit", "series", "library"]
    layout: Callable[[View], Content]
    identity: tuple[str, ...] = ()
    linked: Callable[[View], bool] = lambda view: True
    callbacks: "Callable[[dash.Dash, Site], None] | None" = None
