"""How a child process of control starts: its inherited descriptors, its settings, and its promise to die with control.

Runs in: index and shards, once, before anything else. Contract: control passes file descriptors by number on the command line (see
    control/supervisor); nothing is looked up by name, so there is nothing to clean after a crash.
"""

import argparse
import ctypes
import os
import signal
import socket
from dataclasses import dataclass

from sglfast._segment import Segment
from sglfast.config import ServeConfig, from_json
from sglfast.shm import attach

_PR_SET_PDEATHSIG = 1

# What control says through its socket, a byte each. SETTINGS comes with a descriptor of a memfd that holds the new ones.
STOP, SETTINGS = b"q", b"c"
# Exit code of a child that cannot work with its settings, however often it is started; its last line on standard error says why.
UNUSABLE_SETTINGS = 2


@dataclass(frozen=True, slots=True)
class Boot:
    """What a child got from control. `control` reads EOF when control is gone; `shard` is -1 in index; log_fd: control's own standard
    error, for what must not burden control (the request log). maps_fd: the file of the token route's maps (shm.create_maps), for index."""

    config: ServeConfig
    segment: Segment
    control: socket.socket
    shard: int
    listener: socket.socket | None
    control_address: str
    log_fd: int = 2
    maps_fd: int | None = None

    @property
    def process_slot(self) -> int:
        """This process's slot in the segment: 0 = index, 1 + s = shard s."""
        return self.shard + 1


def boot_child(argv: list[str]) -> Boot:
    """Parse the child's command line, tie its life to control's, map the segment. Exits when control is gone already."""
    parser = argparse.ArgumentParser(description="a child process of `sglfast serve`; not to be started by hand")
    for name in ("--shm-fd", "--config-fd", "--control-fd", "--parent-pid"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--shard", type=int, default=-1)
    parser.add_argument("--listen-fd", type=int, default=-1)
    parser.add_argument("--control-address", default="")
    parser.add_argument("--log-fd", type=int, default=2)
    parser.add_argument("--maps-fd", type=int)
    args = parser.parse_args(argv)

    die_with_parent(args.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the whole group; control decides
    config = _read_settings(args.config_fd)
    control = socket.socket(fileno=args.control_fd)
    control.setblocking(False)
    listener = None
    if args.listen_fd >= 0:
        listener = socket.socket(fileno=args.listen_fd)
        listener.setblocking(False)
    segment = attach(args.shm_fd)
    os.close(args.shm_fd)  # the mapping stays
    return Boot(
        config=config,
        segment=segment,
        control=control,
        shard=args.shard,
        listener=listener,
        control_address=args.control_address,
        log_fd=args.log_fd,
        maps_fd=args.maps_fd,
    )


def _read_settings(fd: int) -> ServeConfig:
    try:
        return from_json(os.pread(fd, os.fstat(fd).st_size, 0))
    finally:
        os.close(fd)


def hear(control: socket.socket) -> ServeConfig | str:
    """What control says: new settings, or why this process is to end. Raises BlockingIOError when it says nothing now."""
    try:
        words, fds, _, _ = socket.recv_fds(control, 1, 1, socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        raise
    except OSError:
        return "control is gone"
    if words == SETTINGS and fds:
        return _read_settings(fds[0])
    return "told to stop" if words else "control is gone"


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, and exit now if it died before the call."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        raise SystemExit("control is gone")
