from typing import Any, Self, final

import zmq

RUN_MESSAGES: int

@final
class LiveSocket:
    """Reads a SUB socket of live KV events. It keeps the socket, which must be of the caller's thread, and does not close it.

    topic: messages with any other topic are passed over; None = none is. Importing the module raises ImportError when pyzmq does not show
    its libzmq's functions.
    """

    def __new__(cls, socket: zmq.Socket[Any], topic: bytes | None = None) -> Self: ...
    def read(
        self, next_seq: int | None = None, max_messages: int = 256, max_bytes: int = 262144
    ) -> tuple[bytes, bytes, list[bytes] | None, int, bool]:
        """Take messages that are there, one at least if there is one, without waiting.

        Return (payloads of a run, where each of them ends as native uint64, frames, messages taken, is nothing left). A run is
        messages of three frames whose sequences are `next_seq` and those behind it; frames: those of the message that ended it by
        being no part of it, or None. next_seq None: no run, so one message at most. A run ends with the payload that
        brings it to `max_bytes`, and has `max_messages` and RUN_MESSAGES messages at most; those passed over count.
        Raises zmq.ZMQError as `recv` of the socket does, but not zmq.Again; OverflowError when next_seq is no uint64.
        """
