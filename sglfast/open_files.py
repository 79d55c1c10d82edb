"""How many files and sockets a process may have open.

Runs in: control, index, shards and `sglfast sim`, once, at the start. Why: each connection is a descriptor, and the usual soft limit
    of 1024 is less than a thousand workers with their clients need; the hard limit is the operator's word.
"""

import contextlib
import resource


def raise_limit() -> None:
    """Allow this process, and the children that it starts, as many as the hard limit says."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # above the kernel's fs.nr_open, where what is there must do
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limit() -> int | None:
    """How many this process may have open at once; None = as many as it likes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft
