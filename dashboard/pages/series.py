"""A series of checkpoints: its measures over steps, one step chosen for all figures, the run as a whole."""

from dashboard import parts
from dashboard.pages import Content, View, page


@page("series", title="Series", of="series", order=0, identity=("run",))
def content(shown: View) -> Content:
    """The measures over the steps."""
    assert shown.entry is not None
    return parts.heading(shown.entry.id, eyebrow="series")
