"""`sglfast serve`: the life of the router, from its flags to its last child.

Runs in: control. The order is the contract: address and shared memory first (what cannot work is said before anything runs), then the
    workers' slots, then the children, then SERVING. At the end: drain, stop the children, release. No child outlives control, however
    it ends (boot.py).
"""

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import uvloop

from sglfast import _segment, open_files
from sglfast._counters import S_INFLIGHT, S_WAITING, RankTable, Totals
from sglfast._segment import Segment
from sglfast._workers import WorkerTable
from sglfast.config import ServeConfig, to_json
from sglfast.config.dp_steering import may_be_steered
from sglfast.config.flags import SettingsParser, given_in
from sglfast.config.sources import Loaded, load
from sglfast.config.worker_urls import named_workers
from sglfast.control.admin import AdminServer
from sglfast.control.admin_keys import AdminKeys
from sglfast.control.admin_workers import WorkerRoutes
from sglfast.control.children import Inheritance
from sglfast.control.fanout import Fanout
from sglfast.control.fetch import Fetcher
from sglfast.control.followers import Followers
from sglfast.control.index_watch import IndexWatch
from sglfast.control.listen import listen, url_of
from sglfast.control.membership import Membership
from sglfast.control.metrics import Metrics
from sglfast.control.parity import ParityWatch
from sglfast.control.pool_watch import PoolWatch
from sglfast.control.rank_watch import RankWatch
from sglfast.control.reload import Reloader
from sglfast.control.supervisor import Commands, Supervisor
from sglfast.control.worker_spec import spec_of
from sglfast.control.worker_totals import WorkerTotals
from sglfast.control.workers import Workers
from sglfast.errors import ConfigError
from sglfast.log_file import LogFile
from sglfast.log_sink import LineSink, descriptor_writer, loss_line
from sglfast.logs import copy_logs_to, set_level, setup_logs
from sglfast.shm import WorkerView, create, create_maps
from sglfast.tls import server_context, worker_context
from sglfast.wire.kv_endpoint import parse_kv_settings

_IDLE_POLL_S = 0.05

_DESCRIPTION = """\
Start the router in front of a pool of workers: an HTTP server that speaks the OpenAI API and gives each request to the worker where it
finishes soonest. Workers are SGLang servers, or others that speak the OpenAI API."""

_EPILOG = """\
examples:
  two workers, routing by load:
    sglfast serve --worker-urls http://10.0.0.5:30000 http://10.0.0.6:30000 --host 0.0.0.0 --port 8000

  routing by what the workers' KV caches hold: start the workers with
    --kv-events-config '{"publisher": "zmq", "endpoint": "tcp://*:5557"}'
  and give the router their model's tokenizer:
    sglfast serve --worker-urls http://10.0.0.5:30000 http://10.0.0.6:30000 --tokenizer-path /models/Qwen3-8B

  prefill and decode apart, each prefill worker with its --disaggregation-bootstrap-port:
    sglfast serve --prefill http://10.0.0.5:30000 8998 --prefill http://10.0.0.6:30000 8998 --decode http://10.0.0.7:30000

  then:
    curl http://127.0.0.1:30000/readyz
    curl http://127.0.0.1:30000/v1/chat/completions -H 'content-type: application/json' \\
      -d '{"model": "any", "messages": [{"role": "user", "content": "hello"}]}'
    curl http://127.0.0.1:30000/metrics

Each flag has a twin in the environment, SGLFAST_PORT for --port, and in the file that --config names; flag before environment before
file. `sglfast check-config` says what would run. SIGHUP reads the file again; the log says what changed and what needs a new start.
SIGTERM or Ctrl-C drains: /readyz says 503, requests in flight are finished, then the program ends. A second signal ends it at once.
exit codes: 0 drained, 1 a process could not be kept alive, 2 a flag cannot work, 128 + signal ended at once by a second signal"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `sglfast serve`; its flags are the fields of ServeConfig."""
    return SettingsParser("sglfast serve", _DESCRIPTION, _EPILOG)


def main(argv: list[str]) -> int:
    """Run until a signal or a failure; returns the exit code, see the end of `--help`."""
    given = given_in(build_parser().parse_args(argv))
    try:
        return run(load(given), lambda: load(given, may_fetch=False))
    except ConfigError as error:
        print(f"sglfast serve: {error}", file=sys.stderr)
        return 2


def run(loaded: Loaded, read_again: Callable[[], Loaded], commands: Commands | None = None) -> int:
    """Run the router; returns the exit code. read_again: the settings at a SIGHUP, without waiting for anybody; commands: what the child
    processes are.

    Raises ConfigError before it runs.
    """
    config = loaded.config
    open_files.raise_limit()
    with contextlib.ExitStack() as owned:
        log_fd = _standard_error()
        owned.callback(os.close, log_fd)
        sinks = _open_log(owned, config, log_fd)
        log = setup_logs("control", config.log_level, config.log_format, sinks[0])
        for sink in sinks[1:]:
            copy_logs_to(sink)
        for note in loaded.notes:
            log.warning(note)
        server_context(config)  # what cannot work is said before anything runs
        listeners = listen(config.host, config.port, config.shards)
        for listener in listeners:
            owned.enter_context(listener)
        config = dataclasses.replace(config, port=listeners[0].getsockname()[1])
        segment, shm_fd = _create_segment(config)
        owned.callback(os.close, shm_fd)
        maps_fd = _create_maps(config, log)
        if maps_fd is not None:
            owned.callback(os.close, maps_fd)
        control = Control(config, segment, shm_fd, maps_fd, listeners, commands or Commands(), log, log_fd, sinks)
        owned.callback(control.close)
        reloader = Reloader(config, loaded, read_again, control.apply, log)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(control.run(reloader))


class Control:
    """The program once its address and memory are there. `close` after `run`."""

    def __init__(
        self,
        config: ServeConfig,
        segment: Segment,
        shm_fd: int,
        maps_fd: int | None,
        listeners: Sequence[socket.socket],
        commands: Commands,
        log: logging.Logger,
        log_fd: int,
        sinks: Sequence[LineSink],
    ) -> None:
        self._config = config
        self._log_fd = log_fd
        self._sinks = sinks
        self._segment = segment
        self._shm_fd = shm_fd
        self._maps_fd = maps_fd
        self._config_fd = _memfd("sglfast-config", to_json(config))
        self._listeners = listeners
        self._commands = commands
        self._log = log
        self._keys = AdminKeys(config)
        self._workers = Workers(
            WorkerTable(segment),
            config.max_ranks,
            log,
            key_route=config.key_route,
            kv_settings=parse_kv_settings(config.kv_endpoint),
            dp_aware=config.dp_aware,
        )
        self._totals = WorkerTotals(segment)
        self._members: Membership | None = None
        self._admin: AdminServer | None = None
        self._fetcher: Fetcher | None = None
        self._supervisor: Supervisor | None = None
        self._signals: list[signal.Signals] = []
        self._first_signal = asyncio.Event()
        self._second_signal = asyncio.Event()

    def close(self) -> None:
        """Release what the settings hold."""
        os.close(self._config_fd)

    def apply(self, config: ServeConfig) -> None:
        """Go on with other settings, and with what their certificate files hold now, here and in the children. Raises ConfigError when
        the files cannot be used, and then nothing has changed."""
        tls = worker_context(config)
        server_context(config)
        if self._admin is not None:
            self._admin.renew_certificates(config)
        if self._fetcher is not None:
            self._fetcher.tls = tls
        old_fd, self._config_fd = self._config_fd, _memfd("sglfast-config", to_json(config))
        self._config = config
        set_level(config.log_level)
        self._keys.config = config
        self._workers.dp_aware = config.dp_aware
        if self._members is not None:
            self._members.apply(config)
        if self._supervisor is not None:
            self._supervisor.tell_settings(self._config_fd)
        os.close(old_fd)

    async def run(self, reloader: Reloader) -> int:
        """Serve until told to end; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, reloader.reload)
        async with contextlib.AsyncExitStack() as owned:
            fetcher = self._fetcher = await owned.enter_async_context(Fetcher(worker_context(self._config)))
            watch = PoolWatch(self._config, self._workers, fetcher, self._log)
            owned.push_async_callback(watch.close)
            followers = Followers(self._segment, self._log)
            members = self._members = Membership(self._config, self._workers, watch, followers, self._totals, self._log)
            owned.push_async_callback(members.close)
            for worker in named_workers(self._config.worker_urls, self._config.prefill, self._config.decode):
                members.add(spec_of(worker))
            admin = self._admin = await self._start_admin(owned, members, watch, fetcher)
            inheritance = Inheritance(self._shm_fd, self._config_fd, admin.address, self._log_fd, self._take_lines, self._maps_fd)
            supervisor = self._supervisor = Supervisor(self._segment, inheritance, self._listeners, self._commands, self._log)
            owned.push_async_callback(supervisor.stop)
            supervisor.start()
            watch_parity = ParityWatch(self._segment, self._workers, self._log, self._totals, self._may_be_steered)
            parity = asyncio.create_task(watch_parity.run())
            owned.callback(parity.cancel)
            rank_watch = asyncio.create_task(RankWatch(self._segment, self._workers, watch.ask_again, self._log).run())
            owned.callback(rank_watch.cancel)
            index_watch = asyncio.create_task(IndexWatch(self._segment, supervisor.kill_index, self._log).run())
            owned.callback(index_watch.cancel)
            return await self._serve(supervisor)

    async def _start_admin(self, owned: contextlib.AsyncExitStack, members: Membership, watch: PoolWatch, fetcher: Fetcher) -> AdminServer:
        metrics = Metrics(
            self._segment,
            lambda: self._workers.views,
            totals=self._totals,
            changes=members.changes,
            lost_lines=self._lost_lines,
            parity_cause=self._workers.parity_cause,
            is_steered=self._may_be_steered,
        )
        admin = AdminServer(metrics.render, self._keys, self._log)
        owned.push_async_callback(admin.close)
        admin.add(WorkerRoutes(members, self._workers, watch, RankTable(self._segment)).routes())
        fanout = Fanout(self._workers, fetcher)
        owned.push_async_callback(fanout.close)
        admin.add(fanout.routes())
        await admin.start(self._config)
        return admin

    def _may_be_steered(self, view: WorkerView) -> bool:
        return may_be_steered(view, self._config)

    def _take_lines(self, lines: bytes) -> None:
        for sink in self._sinks:
            sink.put(lines)

    def _lost_lines(self) -> int:
        return sum(sink.lost_lines for sink in self._sinks)

    def _on_signal(self, number: signal.Signals) -> None:
        self._signals.append(number)
        (self._second_signal if self._first_signal.is_set() else self._first_signal).set()

    async def _serve(self, supervisor: Supervisor) -> int:
        ready = asyncio.create_task(self._become_ready(supervisor))
        first = asyncio.create_task(self._first_signal.wait())
        ends: set[asyncio.Future[Any]] = {first, supervisor.failed}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        first.cancel()
        if supervisor.failed.done():
            self._log.error(f"{supervisor.failed.result()}; the router ends")
        return await self._end(supervisor, supervisor.exit_code if supervisor.failed.done() else 0)

    async def _become_ready(self, supervisor: Supervisor) -> None:
        await supervisor.wait_ready()
        self._segment.state = _segment.SERVING
        url = url_of(self._config.host, self._config.port)
        if self._config.tls_cert_path is not None:
            url = url.replace("http", "https", 1)
        workers = len(self._config.worker_urls) + len(self._config.prefill) + len(self._config.decode)
        with contextlib.suppress(OSError, ValueError):  # nobody has to read it
            print(f"listening on {url} ({self._config.shards} shards, {workers} workers)", flush=True)

    async def _end(self, supervisor: Supervisor, code: int) -> int:
        """Drain and stop all children; a second signal ends this at once."""
        second = asyncio.create_task(self._second_signal.wait())
        ending = asyncio.create_task(self._drain_and_stop(supervisor))
        await asyncio.wait([second, ending], return_when=asyncio.FIRST_COMPLETED)
        second.cancel()
        if ending.done():
            ending.result()
            return code
        self._log.warning("second signal: requests in flight are cut")
        supervisor.kill()
        ending.cancel()
        return code or 128 + self._signals[-1]

    async def _drain_and_stop(self, supervisor: Supervisor) -> None:
        grace_s = self._config.shutdown_grace_secs
        totals = Totals(self._segment)
        self._log.info("draining", extra={"fields": {"inflight_requests": unfinished(totals), "grace_s": grace_s}})
        self._segment.drain_deadline_ms = int((time.time() + grace_s) * 1000)
        self._segment.state = _segment.DRAINING
        left = await wait_idle(totals, grace_s)
        if left:
            self._log.warning("the grace is over, requests are cut", extra={"fields": {"inflight_requests": left}})
        self._segment.state = _segment.STOPPED
        await supervisor.stop()
        self._log.info("stopped")


def unfinished(totals: Totals) -> int:
    """Requests that a worker has, or that wait for their turn."""
    words = totals.shard()
    return max(0, words[S_INFLIGHT]) + max(0, words[S_WAITING])


async def wait_idle(totals: Totals, grace_s: float) -> int:
    """Wait until no request is unfinished, seen twice; returns how many are left when the grace is over."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + grace_s
    was_idle = False
    while True:
        left = unfinished(totals)
        if left == 0 and was_idle:
            return 0
        was_idle = left == 0
        if loop.time() >= end_s:
            return left
        await asyncio.sleep(_IDLE_POLL_S)


def _create_segment(config: ServeConfig) -> tuple[Segment, int]:
    try:
        fd, segment = create(
            max_workers=config.max_workers,
            max_ranks=config.max_ranks,
            max_shards=config.shards,
            capacity_blocks=config.kv_index_blocks,
            prediction_blocks=config.prediction_blocks,
        )
    except OSError as error:
        raise ConfigError(f"--kv-index-blocks {config.kv_index_blocks}: no shared memory of that size ({error.strerror})") from None
    return segment, fd


def _create_maps(config: ServeConfig, log: logging.Logger) -> int | None:
    """The file of the token route's maps; None where there can be none (a limit on the size of files)."""
    try:
        return create_maps(max_ranks=config.max_ranks, capacity_blocks=config.kv_index_blocks)
    except OSError as error:
        log.warning("what is known of engines' hashes will not outlive the index process: no file for it (%s)", error.strerror)
        return None


def _memfd(name: str, data: bytes) -> int:
    """An anonymous file with this content; children read it from its start."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(fd, data)
    return fd


def _standard_error() -> int:
    """A descriptor of standard error. Where there is none (`2>&-`), 0 to 2 are opened first, else they would be given to our sockets."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)
    return os.dup(2)


def _open_log(owned: contextlib.ExitStack, config: ServeConfig, log_fd: int) -> list[LineSink]:
    """The ways out for log lines: standard error, and the file of --log-dir. Raises ConfigError."""
    loss = loss_line("control", config.log_format)
    sinks = [LineSink(descriptor_writer(log_fd), loss)]
    if config.log_dir is not None:
        log_file = LogFile(config.log_dir, config.log_files_kept)
        owned.callback(log_file.close)
        sinks.append(LineSink(log_file.write_lines, loss))
    for sink in sinks:
        owned.callback(sink.close)
    return sinks


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
