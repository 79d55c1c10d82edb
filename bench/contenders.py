"""The routers of a comparison and the workers behind them, each as configuration and command line.

All do the same work: HTTP/1.1 in, keep-alive connections to four workers, round robin, no access log, one serving thread.
"""

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from load import MODEL, Workload
from processes import BenchError, PinnedProcess, require

WORKERS = 4
UPSTREAM_CONNECTIONS = 64  # more than the clients', so that no connection to a worker is closed for want of room

_NGINX = """
{user}
worker_processes 1;
daemon off;
pid nginx.pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    default_type application/json;
    keepalive_requests 1000000000;
    keepalive_timeout 75s;
    client_max_body_size 64m;
    client_body_buffer_size 1m;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
{http}
}}
"""

_NGINX_WORKERS = """
    server {{
        {listen}
        location = {path} {{ return 200 '{answer}'; }}
        location = /server_info {{ return 200 '{server_info}'; }}
        location = /get_server_info {{ return 200 '{server_info}'; }}
        location = /model_info {{ return 200 '{model_info}'; }}
        location = /v1/models {{ return 200 '{models}'; }}
        location = /health {{ return 200 ''; }}
    }}
"""

_NGINX_ROUTER = """
    upstream workers {{
        {servers}
        keepalive {connections};
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://workers;
            proxy_http_version 1.1;
            {extra}
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
        }}
    }}
"""

_HAPROXY = """
global
    nbthread 1
    maxconn 4096
defaults
    mode http
    timeout connect 5s
    timeout client 75s
    timeout server 75s
    option http-keep-alive
    http-reuse always
frontend front
    bind 127.0.0.1:{port}
    default_backend workers
backend workers
    balance roundrobin
    {servers}
"""


@dataclass(frozen=True)
class Setting:
    """Where a contender works: its core, the workers' ports, and the folder of all files. is_streamed: answers are not to wait."""

    core: int
    worker_ports: tuple[int, ...]
    folder: Path
    is_streamed: bool = False


@dataclass(frozen=True)
class Router:
    """A running contender."""

    name: str
    port: int
    process: PinnedProcess


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that were free a moment ago."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


def _nginx(name: str, http: str, core: int, folder: Path) -> PinnedProcess:
    home = folder / name
    home.mkdir()
    config = home / "nginx.conf"
    config.write_text(_NGINX.format(http=http, user="user root;" if os.geteuid() == 0 else ""))
    command = [require("nginx", "nginx-light"), "-p", str(home), "-e", "stderr", "-c", str(config)]
    return PinnedProcess(name, command, core, home / "log")


def start_workers(workload: Workload, core: int, ports: Sequence[int], folder: Path) -> PinnedProcess:
    """One nginx that plays all workers: every answer is fixed and instant."""
    facts = {"model_path": MODEL, "served_model_name": MODEL, "dp_size": 1, "disaggregation_mode": "null", "version": "0.5.23"}
    http = _NGINX_WORKERS.format(
        listen="\n        ".join(f"listen 127.0.0.1:{port};" for port in ports),
        path=workload.path,
        answer=workload.worker_answer,
        server_info=json.dumps(facts),
        model_info=json.dumps({"model_path": MODEL}),
        models=json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}),
    )
    process = _nginx("workers", http, core, folder)
    try:
        for port in ports:
            process.wait_until_ready(f"http://127.0.0.1:{port}/health")
    except BaseException:
        process.stop()
        raise
    return process


def _start_nginx(setting: Setting, port: int) -> PinnedProcess:
    servers = "\n        ".join(f"server 127.0.0.1:{worker};" for worker in setting.worker_ports)
    extra = "proxy_buffering off;" if setting.is_streamed else ""
    http = _NGINX_ROUTER.format(servers=servers, port=port, connections=UPSTREAM_CONNECTIONS, extra=extra)
    return _nginx("nginx", http, setting.core, setting.folder)


def _start_haproxy(setting: Setting, port: int) -> PinnedProcess:
    servers = "\n    ".join(f"server w{worker} 127.0.0.1:{worker}" for worker in setting.worker_ports)
    config = setting.folder / "haproxy.cfg"
    config.write_text(_HAPROXY.format(port=port, servers=servers))
    command = [require("haproxy", "haproxy"), "-db", "-f", str(config)]
    return PinnedProcess("haproxy", command, setting.core, setting.folder / "haproxy.log")


def _start_sglfast(setting: Setting, port: int) -> PinnedProcess:
    program = Path(sys.executable).parent / "sglfast"
    if not program.exists():
        raise BenchError(f"{program} does not exist: run `make build`, then {program.parent}/python bench/compare.py")
    command = [str(program), "serve", "--shards", "1", "--policy", "round_robin", "--port", str(port), "--worker-urls"]
    command += [f"http://127.0.0.1:{worker}" for worker in setting.worker_ports]
    return PinnedProcess("sglfast", command, setting.core, setting.folder / "sglfast.log")


# name -> (how it starts, path that answers 200 once requests can be served)
CONTENDERS = {
    "nginx": (_start_nginx, "/health"),
    "haproxy": (_start_haproxy, "/health"),
    "sglfast": (_start_sglfast, "/readyz"),
}


def start_router(name: str, setting: Setting) -> Router:
    """Start a contender and wait until it is ready. Raises BenchError."""
    start, ready_path = CONTENDERS[name]
    (port,) = free_ports(1)
    process = start(setting, port)
    try:
        process.wait_until_ready(f"http://127.0.0.1:{port}{ready_path}")
    except BaseException:
        process.stop()
        raise
    return Router(name, port, process)
