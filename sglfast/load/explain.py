"""The command `sglfast explain`: asks a router what it would do with a request, and prints the candidates as a table.

Runs in: a process of its own. Contract: sends the body to `/explain/<path>`: nothing is forwarded to a worker and nothing is counted.
    Exit code 0 = explained, 1 = the router has no choice (the table says why) or does not answer, 2 = the flags or the body cannot work.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import orjson
from rich import box
from rich.console import Console
from rich.table import Column, Table

from sglfast.errors import ConfigError
from sglfast.load.client import LoadClient

_TIMEOUT_S = 60.0


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code. Raises ConfigError for what cannot be sent."""
    parser = argparse.ArgumentParser(
        prog="sglfast explain",
        description="Ask a running router which worker it would choose for a request, and why. Nothing is sent to a worker.",
        epilog="""example: sglfast explain '{"model": "m", "messages": [{"role": "user", "content": "hello"}]}'""",
    )
    parser.add_argument("body", help="the JSON body of the request, @FILE to read it from a file, or - for standard input")
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the router (default: %(default)s)")
    parser.add_argument("--path", default="/v1/chat/completions", help="path of the request (default: %(default)s)")
    parser.add_argument("--api-key", help="the router's key, where it asks for one (default: the variable SGLFAST_API_KEY)")
    parser.add_argument("--json", action="store_true", help="print the router's answer as it is")
    args = parser.parse_args(argv)
    status, answer = asyncio.run(_ask(args.url, args.path, _read_body(args.body), args.api_key or os.environ.get("SGLFAST_API_KEY")))
    explanation = _explanation_in(answer) if status == 200 else None
    if args.json:
        print(answer.decode(errors="replace"))
    elif explanation is not None:
        show(explanation, Console())
    else:
        print(f"sglfast explain: {_problem(status, answer)}", file=sys.stderr)
    return 0 if explanation is not None and explanation["choice"] is not None else 1


def _read_body(text: str) -> bytes:
    try:
        data = sys.stdin.buffer.read() if text == "-" else Path(text[1:]).read_bytes() if text.startswith("@") else text.encode()
        orjson.loads(data)
    except OSError as error:
        raise ConfigError(f"{text}: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"the body is no JSON: {error}") from None
    return data


def _explanation_in(answer: bytes) -> dict[str, Any] | None:
    """What a router explains; None when another server has answered."""
    try:
        found = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) and "candidates" in found and "choice" in found else None


async def _ask(url: str, path: str, body: bytes, api_key: str | None) -> tuple[int, bytes]:
    """(status, body) of the router's answer; status 0 and the reason when there is none."""
    client = LoadClient(url)
    if not path.startswith("/") or not path.isprintable() or " " in path:
        raise ConfigError(f"--path {path}: must look like /v1/chat/completions")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise ConfigError("--api-key: must be printable ASCII")
    key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST /explain{path} HTTP/1.1\r\nhost: {client.host}\r\ncontent-type: application/json\r\n{key}content-length: {len(body)}\r\n\r\n"
    )
    try:
        answer = await client.send(head.encode() + body, timeout_s=_TIMEOUT_S, is_stream=False)
    finally:
        await client.close()
    return (answer.status, answer.body) if answer.status else (0, answer.error.encode())


def _problem(status: int, answer: bytes) -> str:
    if status == 0:
        return f"the router does not answer ({answer.decode()}); is one running there? Name it with --url"
    try:
        return f"{status}: {orjson.loads(answer)['error']['message']}"
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"the router answers {status}; is it sglfast?"


def show(explanation: dict[str, Any], console: Console) -> None:
    """Print an explanation as a table, the choice first; where there is none, what the request would get instead."""
    prompt = f"{explanation['prompt_tokens']} tokens, {explanation['prompt_blocks']} blocks of {explanation['block_size']}"
    if explanation["is_approximate"]:
        prompt = f"about {explanation['prompt_tokens']} tokens; compared with what workers were sent before, in blocks of 64 tokens"
    if explanation["unkeyed_because"]:
        prompt = f"not compared with KV caches: {explanation['unkeyed_because']}"
    console.print(f"model {explanation['model']}, policy {explanation['policy']}; prompt: {prompt}", highlight=False)
    table = Table(
        Column("worker", no_wrap=True), "rank", "overlap", "dev/host/disk/predicted", "requests", "tokens", "score", box=box.SIMPLE_HEAD
    )
    choice = explanation["choice"]["worker"] if explanation["choice"] is not None else None
    for row in sorted(explanation["candidates"], key=lambda row: (row["worker"] != choice, not row["eligible"], -row["overlap_blocks"])):
        tiers = row["overlap_blocks_by_tier"]
        score = "-" if row["score"] is None else f"{row['score']:g}"
        table.add_row(
            ("* " if row["worker"] == choice else "  ") + row["worker"],
            str(row["rank"]),
            str(row["overlap_blocks"]),
            f"{tiers['device']}/{tiers['host']}/{tiers['disk']}/{tiers['predicted']}",
            str(row["load"]["requests"]),
            str(row["load"]["tokens"]),
            score,
            style=None if row["eligible"] else "dim",
        )
        for rank in row["ranks"]:
            mark, load = "*" if rank["rank"] == row["rank"] else " ", rank["load"]
            overlap = str(rank["overlap_blocks"])
            table.add_row("", f"{mark} {rank['rank']}", overlap, "", str(load["requests"]), str(load["tokens"]), "", style="dim")
    console.print(table)
    if explanation["would_answer"] is not None:
        _say(console, _refusal(explanation["would_answer"]))
    for row in explanation["candidates"]:
        if row["worker"] == choice or not row["eligible"]:
            _say(console, f"{row['worker']} {row['why']}")
        if row["worker"] == choice:
            for rank in row["ranks"]:
                if rank["rank"] == row["rank"]:
                    _say(console, f"its rank {rank['rank']} {rank['why']}")
    decode = explanation["decode"]
    for row in decode["candidates"] if decode is not None else ():
        if row["worker"] == decode["worker"] or not row["eligible"]:
            _say(console, f"decode worker {row['worker']} {row['why']}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _refusal(would: dict[str, Any]) -> str:
    answer = f"{would['status']} {would['code']}: {would['message']}"
    if would["after_secs"]:
        return f"no worker can be chosen now: the request would wait, and if none has room within {would['after_secs']:g} s, get {answer}"
    return f"no worker can be chosen now: the request would get {answer}"
