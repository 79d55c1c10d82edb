"""Write docs/flags.md and docs/sglang-router.md from the settings and from the list of sglang-router's flags: `make docs`.

The tests compare the files with what this writes, and each row about sglang-router with what the parser does.
"""

import csv
from pathlib import Path

from sglfast.config.fields import BY_ANY_NAME, FIELDS, Field, flag_of
from sglfast.config.flags import help_of
from sglfast.config.sglang_router import DIFFERS, FOREIGN, OTHER_POLICIES
from sglfast.config.sources import OTHER_VARIABLES

HERE = Path(__file__).parent
FLAGS_OF_0_3_2 = HERE.parent / "tests" / "golden" / "sglang_router" / "flags_0.3.2.tsv"

_FLAGS_HEAD = """\
# The settings of `sglfast serve`

Made by `make docs` from `sglfast/config/settings.py`; do not edit.

Each setting is a flag, a variable of the environment and a key of the settings file: `--log-level`, `SGLFAST_LOG_LEVEL` and
`log_level`. A flag wins over the environment, the environment over the file, the file over the default. What means nothing is refused
by name, wherever it stands; `sglfast check-config` with the same flags prints what would run and where each value comes from.

* **Flags**: a switch stands alone or with `true` or `false`; a list takes all words up to the next flag; given twice, the last counts.
  `--prefill` and `--decode` are given once for each worker, and all count.
* **Environment**: a list is separated by commas or blanks (`SGLFAST_CONTROL_PLANE_API_KEYS` and `SGLFAST_PREFILL` by commas only:
  `http://a:30000 8998,http://b:30000 none`); an empty variable is as none.
  No settings are {others}.
  What Kubernetes sets in every pod beside a Service named `sglfast` is passed over.
* **File**: `--config FILE`, or `SGLFAST_CONFIG`; YAML (`.yaml`, `.yml`) or TOML (`.toml`). Every setting is a key of the top level, with
  the type that it has here: `port: "80"` is text and refused. The sections of sgl-router's file mean the same settings, see below.
* **SIGHUP** reads the file again, and the files of keys and certificates that settings name. Settings marked *live* change at once, in all
  processes, for the requests that come then; others are named in the log and wait for a new start. A file that cannot work changes
  nothing, and the log says why.
* **Secrets** (marked) are never printed. On a command line every user of the machine can read them; the environment and files are better.
"""

_PATHS = """
## Which paths are at which address

| paths | main port | `--admin-port`, where given | `--prometheus-port`, where given |
|---|---|---|---|
| the API under `/v1/` and its siblings, `/health`, `/readyz`, `/v1/models` | always | | |
| `/metrics`, `/engine_metrics` | unless `--main-port-paths` is `no-metrics` or `data` | yes | yes |
| `/server_info`, `/model_info`, `/health_generate` | unless `--main-port-paths` is `data` | yes | |
| `/workers` and all else that administers | where there is no `--admin-port` | yes | |
"""

_FILE_HEAD = """
## The file in sgl-router's form

```yaml
server: {host: 0.0.0.0, port: 30000}
observability: {log_level: info, log_format: json}
models:
  - id: my-model                      # the workers tell the names of their models; this one changes nothing
    tokenizer_path: /models/my-model
    policy: cache_aware               # or cache_aware_zmq
    circuit_breaker: {threshold: 3, cool_down_secs: 30}
    cache_aware: {cache_threshold: 0.5, balance_abs_threshold: 32, balance_rel_threshold: 1.1}
discovery:
  backend: static_urls
  static_urls: {urls: ["http://10.0.0.5:30000", "http://10.0.0.6:30000"]}
proxy: {request_timeout_secs: 300}
active_load: {stale_request_timeout_secs: 600}
max_concurrent_requests: 512          # any setting of the tables above, beside the sections
```

| key | setting |
|---|---|
"""

_ROUTER_HEAD = """\
# From sglang-router to sglfast

Made by `make docs` from `sglfast/config`; do not edit.

A script that starts `python -m sglang_router.launch_router` (or `sglang-router`, `smg`) keeps its flags: put `sglfast serve` in their
place. The {count} flags of sglang-router 0.3.2, in the order of its help: *same* means name, form and default; *differs* says in what; *not
offered* ends the start with this sentence, so that nothing is lost in silence. Flags that change nothing here are named in the log.

| flag | here | default there | what is not the same |
|---|---|---|---|
"""

_POLICIES_HEAD = """
Policies of sglang-router that are not offered:

| policy | instead |
|---|---|
"""

_SEEN = """
What clients see differently:

| of sglang-router 0.3.2 | here |
|---|---|
| its own errors have a `type` that is the status in words and `X-SMG-Error-Code`, or no body at all (401, 404, 405, 408, 429) | all \
have OpenAI's error object and `x-router-error-code`; most codes have other names (`no_healthy_workers` for `no_available_workers`) |
| bodies that are no JSON or lack a field: 400, 415 or 422 from the router | they go on; the worker says what is wrong with them |
| bodies are written anew: unknown fields of chats are lost, defaults are added | the same bytes, for SGLang with a `rid` in front |
| seven of a request's headers go on to the worker | all that are not for one connection only |
| an `x-request-id` that it makes begins with `chatcmpl-`, `cmpl-`, `gnt-`, `resp-` or `req-` | 32 hex digits |
| answers of `/v1/rerank` are made anew, with `results` | as the worker gives them |
| `/v1/responses/ID`, `/v1/conversations`, `/v1/tokenizers`, `/parse`, `/wasm`, `/ha` | 404 |

And what dashboards do:

| metric there, on port 29000 | here, on the main port |
|---|---|
| `smg_http_responses_total`, `smg_http_connections_active` | `sglfast_responses_total` (by class of status), `sglfast_connections` |
| `smg_router_request_duration_seconds`, `smg_router_ttft_seconds` | `sglfast_request_duration_seconds`, `sglfast_ttft_seconds` |
| `smg_worker_health`, `smg_worker_pool_size` | `sglfast_worker_up`, `sglfast_workers` |
| `smg_worker_requests_active` | `sglfast_worker_inflight_requests` |
| `smg_worker_selection_total` | `sglfast_worker_selected_requests_total` |
| `smg_worker_cb_state` | `sglfast_breaker_state`, with the same numbers |
| `smg_worker_cb_transitions_total` | `sglfast_breaker_transitions_total` |
| `smg_worker_retries_total`, `smg_worker_retries_exhausted_total` | `sglfast_retries_total`, `sglfast_retries_exhausted_total` |
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _form(field: Field) -> str:
    if "choices" in field.meta:
        return ", ".join(f"`{choice}`" for choice in field.meta["choices"])
    name = {int: "whole number", float: "number", bool: "switch", str: "text"}[field.kind]
    text = f"list of {name}" if field.is_list else name
    low, high = field.meta.get("low"), field.meta.get("high")
    if low is not None:
        text += f", {low} to {high}" if high is not None else f", {low} or more"
    return text


def flags_page() -> str:
    """The text of docs/flags.md."""
    parts = [_FLAGS_HEAD.format(others=", ".join(f"`{name}`" for name in sorted(OTHER_VARIABLES)))]
    group = ""
    for field in FIELDS.values():
        if field.meta["group"] != group:
            group = field.meta["group"]
            parts.append(f"\n## {group[0].upper()}{group[1:]}\n\n| flag | value | what |\n|---|---|---|\n")
        flags = ", ".join(f"`{flag_of(name)}`" for name in field.names)
        marks = "".join(f" *{mark}*" for mark in ("live", "secret") if mark in field.meta)
        parts.append(f"| {flags} | {_form(field)} | {_cell(help_of(field))}{marks} |\n")
    parts += [_PATHS, _FILE_HEAD]
    parts += [f"| `{field.meta['section']}` | `{field.flag}` |\n" for field in FIELDS.values() if "section" in field.meta]
    return "".join(parts)


def flags_of_sglang_router() -> list[dict[str, str]]:
    """Rows with flag, words, choices and default, in the order of its help."""
    with open(FLAGS_OF_0_3_2, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def verdict(flag: str) -> tuple[str, str]:
    """(same | differs | not offered, what is not the same) of a flag of sglang-router."""
    name = flag.removeprefix("--").replace("-", "_")
    if name in FOREIGN:
        foreign = FOREIGN[name]
        if not foreign.is_refused:
            return "differs", f"changes nothing: {foreign.why}"
        fine = f" (`{'`, `'.join(foreign.fine)}` is taken)" if foreign.fine else ""
        return "not offered", foreign.why + fine
    field = BY_ANY_NAME[name]
    return ("differs", DIFFERS[field.name]) if field.name in DIFFERS else ("same", "")


def router_page() -> str:
    """The text of docs/sglang-router.md."""
    rows = flags_of_sglang_router()
    parts = [_ROUTER_HEAD.format(count=len(rows))]
    for row in rows:
        here, why = verdict(row["flag"])
        parts.append(f"| `{row['flag']}` | {here} | `{row['default']}` | {_cell(why)} |\n")
    parts.append(_POLICIES_HEAD)
    parts += [f"| `{name}` | {_cell(instead)} |\n" for name, instead in OTHER_POLICIES.items()]
    parts.append(_SEEN)
    return "".join(parts)


PAGES = {"flags.md": flags_page, "sglang-router.md": router_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page())
