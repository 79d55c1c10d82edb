"""One replay as data: what was asked of whom, and one sample a request. Saved as JSON, so that runs can be compared later.

Runs in: `sglfast replay`.
Contract: numbers are computed from the samples whenever they are shown (load/report.py). Times are in ms of real time, also when
    a trace is sped up. A file that is no saved run raises ConfigError.
"""

from collections.abc import Mapping

import msgspec

from sglfast.errors import ConfigError

FORMAT = 1


class Sample(msgspec.Struct, omit_defaults=True):
    """What one request of the trace met. A count that the server or router did not report is -1.

    due_ms: when the trace wanted it sent, from the start of the run; lag_ms: how much later it was sent; blocks: its block
    references; overlap_blocks, prompt_blocks, rank, state: the router's prediction, in the worker's KV blocks.
    error: "" = good, else its kind (load/client.py).
    """

    due_ms: float
    lag_ms: float
    input_tokens: int
    blocks: int
    ttft_ms: float = -1.0
    latency_ms: float = 0.0
    error: str = ""
    prompt_tokens: int = -1
    cached_tokens: int = -1
    output_tokens: int = -1
    worker: str = ""
    rank: int = -1
    overlap_blocks: int = -1
    prompt_blocks: int = -1
    state: str = ""


class Run(msgspec.Struct, kw_only=True):
    """A replay. label: its name in tables (the policy, when replay started the router itself).

    infinite_blocks, infinite_tokens: hit ratios (0..1) that one worker with an infinite cache gets on the measured requests, in
    block references and in tokens. warmup: requests sent before the measured ones. delayed: requests that the bound of open
    requests held back. machine_busy: share (0..1) of all CPUs' time that was not idle, by whatever program; -1 = unknown.
    page_tokens: the workers' KV block size, 0 = unknown. error_texts: one example for each kind of error.
    settled: the requests that were sent again one by one after the run, when every KV event had arrived.
    """

    format: int = FORMAT
    label: str
    trace: str
    endpoint: str
    speed_up: float
    warmup: int
    wall_s: float
    infinite_blocks: float
    infinite_tokens: float
    delayed: int
    resends: int
    machine_busy: float
    page_tokens: int
    error_texts: dict[str, str]
    samples: list[Sample]
    settled: list[Sample]


def save_run(path: str, run: Run, summary: Mapping[str, object]) -> None:
    """Write a run as JSON, with its numbers for other programs (`load_run` ignores them). Raises ConfigError."""
    try:
        with open(path, "wb") as file:
            file.write(msgspec.json.encode({"summary": summary, **msgspec.structs.asdict(run)}))
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written: {error.strerror}") from error


def load_run(path: str) -> Run:
    """Read a saved run. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            run = msgspec.json.decode(file.read(), type=Run)
    except OSError as error:
        raise ConfigError(f"run {path}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"run {path}: not a run that `sglfast replay --json` saved: {error}") from error
    if run.format != FORMAT:
        raise ConfigError(f"run {path}: has format {run.format}, this sglfast reads format {FORMAT}")
    return run


def read_prediction(header: str, sample: Sample) -> None:
    """Fill a sample from the router's answer header `x-sglfast-kv: worker=URL; rank=R; overlap_blocks=N; prompt_blocks=M; state=S`.

    Parts that are missing or are no numbers leave the sample's own values.
    """
    for part in header.split(";"):
        name, _, value = part.strip().partition("=")
        if name in ("worker", "state"):
            setattr(sample, name, value)
        elif name in ("rank", "overlap_blocks", "prompt_blocks") and value.isdecimal():
            setattr(sample, name, int(value))
