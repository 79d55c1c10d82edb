"""Base-128 numbers of protobuf, for messages that are put together from encoded pieces.

Runs in: the metadata service. Format: protobuf wire format, docs "encoding".
"""


def varint(value: int) -> bytes:
    """A number, 0 or more, in seven bits a byte, the lowest first."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
