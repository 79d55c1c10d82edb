"""`sglfast modelexpress`: the metadata service, and a look into one.

Runs in: the process of the command. Contract: exit code 0 after a signal, 2 with a sentence for settings that cannot work or a storage that
    does not open. When the service listens, one line on standard output says where.
"""

import argparse
import asyncio
import gc
import signal
import sys
from typing import TYPE_CHECKING

from sglfast.errors import ConfigError
from sglfast.logs import setup_logs

if TYPE_CHECKING:
    from sglfast.modelexpress import settings

_GC_THRESHOLD = 5_000  # new objects between two looks for cyclic garbage, of which calls make little

DESCRIPTION = """\
The metadata service of ModelExpress: a new worker asks it which running workers hold the same weights, and loads them from
there instead of from disk. Speaks the API of every `modelexpress` client since 0.3.0 (April 2026).

  sglfast modelexpress serve --host 0.0.0.0              embedded storage, in the file modelexpress.sqlite3
  sglfast modelexpress serve --storage redis://db:6379/0 several services on one Redis or Valkey
  sglfast modelexpress sources --url 10.0.0.9:8001       what a service knows (any server of this API)
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of both commands. Raises ConfigError when the extra is not installed."""
    try:
        from sglfast.modelexpress import schema  # noqa: F401  (says itself what to install or build)
    except ImportError as error:
        raise ConfigError(str(error)) from error
    try:
        from sglfast.modelexpress import server, settings, sources  # noqa: F401  (the server: so that a lack shows at --help)
    except ImportError as error:
        raise ConfigError(f"a part of the extra is missing ({error}); install it: pip install 'sglfast[modelexpress]'") from error
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="sglfast modelexpress", description=DESCRIPTION, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    settings.add_flags(commands.add_parser("serve", help="serve the API"))
    sources.add_flags(commands.add_parser("sources", help="show the sources that a service knows"))
    return parser


def main(argv: list[str]) -> int:
    """Run one of the commands; return the exit code. Raises ConfigError and StorageError, which `sglfast` prints."""
    arguments = build_parser().parse_args(argv)
    if arguments.command == "sources":
        from sglfast.modelexpress import sources

        return sources.show(arguments)
    from sglfast.modelexpress.settings import from_args

    asyncio.run(_serve(from_args(arguments)))
    return 0


async def _serve(config: "settings.ServeSettings") -> None:
    from sglfast.modelexpress.server import Server

    log = setup_logs("modelexpress", config.log_level, config.log_format)
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)
    server = Server(config, log)
    await server.start()
    # What is loaded by now stays: the collector need not walk it again, which would hold every call up for tens of milliseconds.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    metrics = f", metrics at http://{config.host}:{server.metrics_port}/metrics" if server.metrics_port is not None else ""
    print(f"sglfast modelexpress: serving {config.host}:{server.port}{metrics}. Ctrl-C ends it.", flush=True)
    await signals.get()
    log.info("stopping", extra={"fields": {"grace_secs": config.shutdown_grace_secs}})
    stopping = asyncio.create_task(server.stop())
    second = asyncio.create_task(signals.get())
    await asyncio.wait((stopping, second), return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        log.warning("a second signal: stopping at once")
        await server.stop_now()
    second.cancel()
    await stopping


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
