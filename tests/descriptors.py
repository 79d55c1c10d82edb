"""Waiting for a descriptor whatever its number: `select` refuses those above 1,023, which a process with many tests behind it can have."""

import select


def is_readable(fd: int, within_s: float) -> bool:
    """Wait until there is something to read, or the other end is closed."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(within_s * 1000))
