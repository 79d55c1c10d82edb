"""The load of a comparison: one fixed chat request, sent by wrk as fast as the answers come.

The request is the one that the openai Python client makes: the same 13 headers, a body of a given size.
"""

import json
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from processes import BenchError

MODEL = "bench-model"
_FILLER = "The quick brown fox jumps over the lazy dog while the router looks for a worker. "

# wrk hands every finished run to `done`; the line is read back by `run_wrk`. An error status is one above 399.
_SCRIPT = """
local request = "{request}"
wrk.format = function() return request end
done = function(summary, latency)
    io.write(string.format(
        'RESULT {{"requests": %d, "bytes": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, '
            .. '"connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}}\\n',
        summary.requests, summary.bytes, summary.duration, latency:percentile(50), latency:percentile(99),
        summary.errors.connect, summary.errors.read, summary.errors.write, summary.errors.status, summary.errors.timeout))
end
"""


@dataclass(frozen=True)
class Workload:
    """What is asked and what a worker answers. Work of another kind (streams, say) is another function below that makes one."""

    name: str
    path: str
    body: bytes
    worker_answer: str  # fixed JSON text of a worker

    def request(self, port: int) -> bytes:
        """The whole HTTP request to 127.0.0.1:`port`."""
        head = [
            f"POST {self.path} HTTP/1.1",
            f"host: 127.0.0.1:{port}",
            "accept-encoding: gzip, deflate",
            "connection: keep-alive",
            "accept: application/json",
            "content-type: application/json",
            "user-agent: OpenAI/Python 1.99.9",
            "x-stainless-lang: python",
            "x-stainless-package-version: 1.99.9",
            "x-stainless-os: Linux",
            "x-stainless-arch: x64",
            "x-stainless-async: false",
            "authorization: Bearer sk-0123456789abcdef0123456789abcdef0123456789abcdef",
            f"content-length: {len(self.body)}",
        ]
        return "\r\n".join([*head, "", ""]).encode() + self.body


def chat(body_bytes: int) -> Workload:
    """A chat completion without streaming: a request of `body_bytes`, an answer of about 500 bytes."""
    body = {
        "messages": [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": ""}],
        "model": MODEL,
        "max_tokens": 16,
        "temperature": 0,
    }
    missing = body_bytes - len(json.dumps(body))
    if missing < 0:
        raise BenchError(f"a chat body has at least {len(json.dumps(body))} bytes, {body_bytes} are too few")
    body["messages"][1]["content"] = (_FILLER * (missing // len(_FILLER) + 1))[:missing]  # type: ignore[index]
    answer = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion",
        "created": 1760000000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": _FILLER.strip(), "reasoning_content": None, "tool_calls": None},
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": None,
            }
        ],
        "usage": {"prompt_tokens": 421, "total_tokens": 437, "completion_tokens": 16, "prompt_tokens_details": None},
    }
    return Workload(f"chat, {body_bytes} bytes", "/v1/chat/completions", json.dumps(body).encode(), json.dumps(answer))


def stream_request(port: int) -> bytes:
    """A whole HTTP request for a streamed chat completion."""
    workload = chat(2048)
    return Workload("stream", workload.path, workload.body[:-1] + b', "stream": true}', "").request(port)


@dataclass(frozen=True)
class LoadResult:
    """What wrk saw. Errors are counts of connections, of responses for `status`."""

    requests: int
    bytes: int
    duration_us: int
    p50_us: int
    p99_us: int
    connect: int
    read: int
    write: int
    status: int
    timeout: int

    def check(self) -> "LoadResult":
        """Raises BenchError unless every request was answered well."""
        errors = {name: value for name, value in asdict(self).items() if name in _ERRORS and value}
        if errors or not self.requests:
            raise BenchError(f"{self.requests} answers, errors {errors}: such a round measures nothing")
        return self


_ERRORS = {"connect", "read", "write", "status", "timeout"}


def run_wrk(wrk: str, workload: Workload, port: int, *, connections: int, seconds: int, core: int, folder: Path) -> LoadResult:
    """One run of wrk with one thread on `core`. Raises BenchError on any error of any request."""
    script = folder / f"load_{port}.lua"
    # Lua turns CR LF inside a long bracket into LF, so every byte that is no letter or digit is written as its number.
    request = "".join(chr(byte) if chr(byte).isalnum() and byte < 128 else f"\\{byte:03d}" for byte in workload.request(port))
    script.write_text(_SCRIPT.format(request=request))
    command = ["taskset", "-c", str(core), wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script)]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{port}{workload.path}"],
        capture_output=True, text=True, timeout=seconds + 60, check=False,
    )  # fmt: skip
    found = re.search(r"^RESULT (\{.*\})$", done.stdout, re.MULTILINE)
    if found is None:
        raise BenchError(f"wrk gave no result:\n{done.stdout}{done.stderr}")
    return LoadResult(**json.loads(found[1])).check()
