from typing import final

@final
class ChatScan:
    """A chat body that was split: `context`, `tools` and the messages, each JSON in raw bytes.

    body: the bytes given; len(scan): number of messages, at least 1. Positions outside raise IndexError.
    """

    body: bytes
    def __len__(self) -> int: ...
    def start(self, position: int) -> int:
        """Offset in `body` of the message's first byte."""

    def end(self, position: int) -> int:
        """Offset in `body` behind the message's last byte."""

    def message(self, position: int) -> bytes:
        """The message as it was written."""

    def is_flat(self, position: int) -> bool:
        """Whether neither this message nor one behind it holds an object or an array."""

    def name(self, count: int, kind: bytes | None = None) -> bytes:
        """16 bytes that stand for the first `count` messages, from 0 to all of them.

        kind: 16 bytes of chance that stand for whatever else must be the same. Raises ValueError when it has another size.
        """

    def beginnings(self, limit: int, last: int, first: int, kind: bytes) -> list[bytes]:
        """`name` of the `last` longest beginnings of at most `limit` messages, the longest first, then of `first` messages and less."""

    @property
    def context_name(self) -> bytes:
        """16 bytes that stand for the bytes before and behind the messages."""

    @property
    def context(self) -> bytes:
        """The body with [] in place of its messages, and null in place of its tools."""

    @property
    def tools(self) -> bytes:
        """The value of `tools` as it was written, empty when there is none."""

def string_end(text: bytes, *, is_narrow: bool = False) -> int:
    """Offset of the quote that ends a string of which `text` has all but the quote before it; -1 when there is none.

    is_narrow: as on a processor without registers of 32 bytes.
    """

def scan_chat(body: bytes, seed: int) -> ChatScan | None:
    """Split a chat body; None when it is not of the usual form: an object whose `messages` are objects, written once, as `tools` are.

    seed: 64 bits that make the names; the same for all names that are compared. None does not mean that the body is wrong.
    """
