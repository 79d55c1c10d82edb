"""One Prometheus text of many workers' texts: every sample gets the label `worker_addr`, every family stands together once.

Runs in: control, in a thread (a line costs about 1 us). Contract: what is no sample, HELP or TYPE is dropped; the first worker's HELP
    and TYPE of a family stay. Names `sglang:x` become `sglang_x`, as sglang-router writes them (spec/gateway.md 3.1): colons are
    reserved for recording rules, and dashboards made for that router go on working. Other names are kept.
Format: Prometheus text 0.0.4.
"""

import re
from collections.abc import Iterable

_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?[ \t]+([+-]?(?:[0-9.][0-9.eE+-]*|Inf|NaN)(?:[ \t]+-?[0-9]+)?)[ \t]*")
_NOTE = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*)(.*)")
_SUFFIXES = ("", "_bucket", "_count", "_sum", "_total", "_created", "_info")


def merged(texts: Iterable[tuple[str, str]]) -> str:
    """texts: (worker's URL, its metrics)."""
    notes: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for url, text in texts:
        label = 'worker_addr="{}"'.format(url.replace("\\", "\\\\").replace('"', '\\"'))
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                note = _NOTE.fullmatch(line)
                if note is not None:
                    family = _renamed(note[2])
                    notes.setdefault(family, {}).setdefault(note[1], note[3])
                    samples.setdefault(family, [])
                continue
            sample = _SAMPLE.fullmatch(line)
            if sample is None:
                continue
            name = _renamed(sample[1])
            if not (name.startswith(family) and name[len(family) :] in _SUFFIXES):
                family = name
            labels = f"{label},{sample[2]}" if sample[2] else label
            samples.setdefault(family, []).append(f"{name}{{{labels}}} {sample[3]}")
    lines: list[str] = []
    for family, rows in samples.items():
        if rows:
            lines += [f"# {kind} {family}{rest}" for kind, rest in notes.get(family, {}).items()]
            lines += rows
    return "\n".join(lines) + "\n" if lines else ""


def _renamed(name: str) -> str:
    return "sglang_" + name.removeprefix("sglang:") if name.startswith("sglang:") else name
