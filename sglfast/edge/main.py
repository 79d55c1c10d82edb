"""A shard: `python -m sglfast.edge.main`, started by control. Wires the parts of the request path and serves until told to stop."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

import uvloop

from sglfast import open_files
from sglfast._hashtree import TreeReader
from sglfast.boot import UNUSABLE_SETTINGS, Boot, boot_child, hear
from sglfast.config import ServeConfig
from sglfast.edge.door import Door
from sglfast.edge.given_ids import IdsPromptKeyer
from sglfast.edge.request import PromptKeyer
from sglfast.edge.shard import Shard
from sglfast.errors import ConfigError
from sglfast.logs import setup_logs


def _make_keyer(boot: Boot, loop: asyncio.AbstractEventLoop) -> PromptKeyer:
    """The prompt path; a tokenizer only when the settings name one, because it is most of a shard's memory."""
    if boot.config.tokenizer_path is None:
        return IdsPromptKeyer(loop)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one prompt at a time, in our own thread
    from sglfast.prompt.keys import PromptReader, RequestKind
    from sglfast.prompt.lazy import LazyKeyer
    from sglfast.prompt.raw import RawReader
    from sglfast.prompt.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(boot.config.tokenizer_path, boot.config.chat_template)
    keyer = LazyKeyer(tokenizer, boot.config.prompt_cache_bytes)
    return PromptKeyer(
        PromptReader(tokenizer),
        keyer,
        RequestKind,
        loop,
        raw=RawReader(keyer),
        here=TreeReader(boot.segment).match,
        there=TreeReader(boot.segment).match,
    )


async def _wait_for_stop(control: socket.socket, apply: Callable[[ServeConfig], None]) -> str:
    """Returns when control says stop or is gone; new settings go to `apply`."""
    loop = asyncio.get_running_loop()
    end: asyncio.Future[str] = loop.create_future()

    def listen() -> None:
        try:
            heard = hear(control)
        except BlockingIOError:
            return
        if not isinstance(heard, str):
            apply(heard)
        elif not end.done():
            end.set_result(heard)

    loop.add_reader(control, listen)
    try:
        return await end
    finally:
        loop.remove_reader(control)


async def serve(boot: Boot) -> None:
    """Serve the inherited listening socket until control says stop."""
    loop = asyncio.get_running_loop()
    log = setup_logs(f"shard{boot.shard}", boot.config.log_level, boot.config.log_format)
    keyer = _make_keyer(boot, loop)
    shard = Shard(boot, loop, keyer, log)
    assert boot.listener is not None
    boot.segment.process_start(boot.process_slot, os.getpid(), int(time.time() * 1000))
    shard.router.refresh()
    door = shard.door = Door(shard, boot.listener)
    await door.open()
    # What is here now stays; what comes is freed by reference count. A full collection over thousands of connections would stall all.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
    boot.segment.process_ready(boot.process_slot)
    shard.tick()
    log.debug("serving")
    why = await _wait_for_stop(boot.control, shard.apply)
    log.debug("stopping", extra={"fields": {"why": why}})
    door.close()
    for client in list(shard.clients):
        client.stop()
    keyer.close()
    if shard.request_log is not None:
        shard.request_log.close()
    await asyncio.sleep(0.05)  # sends what was written; whoever has not read it by now has had its grace


def main(argv: list[str]) -> int:
    """Entry of the process; returns its exit code."""
    boot = boot_child(argv)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # draining is control's word, said in shared memory
    open_files.raise_limit()
    try:
        uvloop.run(serve(boot))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return UNUSABLE_SETTINGS
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
