"""Stand-ins for the children of control, and a control with such children: small programs that the tests of control start.

    control_standin.py index serve | crash | stubborn       <arguments of boot.py>
    control_standin.py shard serve | crash | stubborn | crash_when_ready | silent | unusable      <arguments of boot.py>
    control_standin.py control INDEX SHARD      <flags of sglfast serve>        INDEX, SHARD: one of the words above

A shard serves one line a connection: `who` is answered with its pid; `work SECONDS` is answered after that time and in flight
until then; `die TEXT` ends it with exit code 3 and TEXT on standard error, its counters left as `work` of another connection has them.
"""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from sglfast._counters import Column
from sglfast._segment import DRAINING
from sglfast.boot import UNUSABLE_SETTINGS, Boot, boot_child


def serve_connection(connection: socket.socket, column: Column) -> None:
    with connection:
        word, _, rest = connection.makefile().readline().strip().partition(" ")
        if word == "die":
            print(rest, file=sys.stderr, flush=True)
            os._exit(3)
        if word == "work":
            column.begin(0, 100, 0)
            connection.sendall(b"begun\n")
            time.sleep(float(rest))
            column.end(0, 100, 4, 10)
        connection.sendall(b"%d\n" % os.getpid())


def serve(boot: Boot) -> None:
    assert boot.listener is not None
    column = Column(boot.segment, boot.shard)
    boot.listener.settimeout(0.02)
    boot.control.setblocking(False)
    while True:
        try:
            connection = boot.listener.accept()[0]
        except TimeoutError:
            pass
        else:
            connection.settimeout(20)
            threading.Thread(target=serve_connection, args=(connection, column), daemon=True).start()
        try:
            said = boot.control.recv(1)
        except BlockingIOError:
            continue
        print(f"shard{boot.shard} was told {said!r}, draining={boot.segment.state >= DRAINING}", file=sys.stderr, flush=True)
        os._exit(0)


def main(role: str, behaviour: str, argv: list[str]) -> None:
    boot = boot_child(argv)
    if behaviour == "crash":
        print("half of the story\nValueError: there is no tokenizer", file=sys.stderr, flush=True)
        sys.exit(1)
    if behaviour == "unusable":
        print("tokenizer path '/x': no such folder", file=sys.stderr, flush=True)
        sys.exit(UNUSABLE_SETTINGS)
    if behaviour == "stubborn" or role == "shard":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    boot.segment.process_start(boot.process_slot, os.getpid(), int(time.time() * 1000))
    if behaviour == "silent":
        time.sleep(60)
    boot.segment.process_ready(boot.process_slot)
    if behaviour == "crash_when_ready":
        print("died of old age", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGABRT)
    if behaviour == "serve" and role == "shard":
        serve(boot)
    time.sleep(60)


def control(index: str, shard: str, flags: list[str]) -> int:
    from sglfast.config.flags import given_in
    from sglfast.config.sources import load
    from sglfast.control.main import build_parser, run
    from sglfast.control.supervisor import Commands

    me = (sys.executable, __file__)
    commands = Commands(index=(*me, "index", index), shard=(*me, "shard", shard))
    given = given_in(build_parser().parse_args(flags))
    return run(load(given), lambda: load(given), commands)


if __name__ == "__main__":
    if sys.argv[1] == "control":
        sys.exit(control(sys.argv[2], sys.argv[3], sys.argv[4:]))
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
