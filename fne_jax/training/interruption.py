"""Stopping in good order on Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal


class StopRequest:
    """Remembers a signal while it is a context; a second one takes its usual effect at once.

    Attributes:
      signal_number: the signal that came, or None.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.signal_number: int | None = None
        self._previous = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        del frame
        self.signal_number = number
        for other in self._SIGNALS:
            signal.signal(other, signal.SIG_DFL)
