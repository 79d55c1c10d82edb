"""Our own code has failed in the middle of a request: its client gets a 500, everybody else goes on, and the log says where.

Runs in: shards, event loop. Contract: whoever calls code of ours for one client, from the transport, a timer or a thread's end, has what it
    raises end here (`ClientConnection.on_broken`). Without that the event loop would close the connection without a word, or
    leave the request without an answer until its time is over.
What is logged are the kind of the error and the places, never its text: that may quote a prompt.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging

_PLACES = 6


def report(log: logging.Logger, error: BaseException) -> None:
    """Log an error that should not have happened, with the innermost places that it came through."""
    frames = traceback.extract_tb(error.__traceback__)[-_PLACES:]
    places = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    log.error("an error of the router's own ended a request", extra={"fields": {"error": type(error).__name__, "at": places}})
