"""The figures that an app has drawn, kept for the next request of the same figures."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future

from diagnostics.core.analysis import Result
from diagnostics.report import content
from diagnostics.report.content import EmbeddedFigure

Drawn = tuple[list[EmbeddedFigure], list[str]]  # the figures, and why some are missing

POINTS = 800  # of one figure: what a browser redraws without a noticeable delay


class FigureCache:
    """The most recently requested figures of one app.

    Requests of one key wait for a single drawing of it; they never wait for another key. What failed is drawn
    again at the next request.
    """

    def __init__(self, size: int = 32):
        self.size = size
        self.futures: OrderedDict[Hashable, Future[Drawn]] = OrderedDict()
        self.lock = threading.Lock()  # never held while drawing

    def get(self, key: Hashable, result: Callable[[], Result]) -> Drawn:
        """The figures under a key, drawn from the result if they are not cached."""
        with self.lock:
            future = self.futures.get(key)
            drawing = future is None
            if future is None:
                future = self.futures[key] = Future()
                while len(self.futures) > self.size:
                    self.futures.popitem(last=False)
            self.futures.move_to_end(key)
        if not drawing:
            return future.result()
        try:
            drawn = content.embedded_figures(result(), POINTS)
        except BaseException as error:
            self._forget(key, future)
            future.set_exception(error)
            raise
        if drawn[1]:
            self._forget(key, future)
        future.set_result(drawn)
        return drawn

    def _forget(self, key: Hashable, future: "Future[Drawn]") -> None:
        with self.lock:
            if self.futures.get(key) is future:
                del self.futures[key]
