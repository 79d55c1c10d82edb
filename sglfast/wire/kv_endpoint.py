"""`--kv-endpoint`: where workers publish KV events that do not tell it themselves, as vLLM does not.

Runs in: control. No I/O. Form: `[URL=]tcp://HOST:PORT[,replay=PORT][,topic=TEXT][,block_size=N][,dp_size=N]`.
Contract: with a URL it is the truth about that worker, whatever the worker says; without one it holds for every worker that says
    nothing. A HOST of `*` (what vLLM's own `--kv-events-config` says) is the host of the worker's URL. block_size is what the worker
    tells as its page size, else 16, which is vLLM's default. Rank r of a worker is at PORT + r, its replay likewise.
"""

from collections.abc import Sequence

import msgspec

from sglfast.errors import ConfigError
from sglfast.wire.server_info import RANK_WAYS_OF_VLLM, KvEndpoint, WorkerFacts, host_of, is_wildcard_host, split_tcp

_BLOCK_TOKENS = 16
_NUMBER_MAX = 1 << 20
_PORT_MAX = 65_535
_FORM = "[URL=]tcp://HOST:PORT[,replay=PORT][,topic=TEXT][,block_size=N][,dp_size=N]"
_UNKNOWN = WorkerFacts(
    model=None,
    kv=None,
    dp_size=1,
    disaggregation_mode=None,
    disaggregation_bootstrap_port=None,
    bigram=False,
    version=None,
    startup_time=None,
    page_size=None,
    key_route="tokens",
    adapters="models",
    rank_ways=RANK_WAYS_OF_VLLM,
    engine="vllm",
)


class KvSetting(msgspec.Struct, frozen=True):
    """One `--kv-endpoint`. worker_url: None = every worker that tells nothing; block_size: tokens, None = as the worker says."""

    worker_url: str | None
    host: str
    port_base: int
    topic: str = ""
    replay_port_base: int | None = None
    block_size: int | None = None
    dp_size: int = 1


def parse_kv_settings(texts: Sequence[str]) -> list[KvSetting]:
    """The settings of all `--kv-endpoint`s. Raises ConfigError."""
    settings = [_parse(text) for text in texts]
    urls = [setting.worker_url for setting in settings]
    for url in urls:
        if urls.count(url) > 1:
            raise ConfigError(f"--kv-endpoint: {'two endpoints are without a URL' if url is None else f'{url} has two endpoints'}")
    return settings


def _parse(text: str) -> KvSetting:
    place, *options = text.strip().split(",")
    url, equals, endpoint = place.rpartition("=")
    address = split_tcp(endpoint)
    if address is None or (equals and not url.startswith(("http://", "https://"))):
        raise ConfigError(f"--kv-endpoint {text}: must look like {_FORM}")
    fields: dict[str, object] = {"worker_url": _plain(url) if equals else None, "host": address[0], "port_base": address[1]}
    for option in options:
        name, _, value = option.partition("=")
        if name == "topic":
            fields["topic"] = value
        elif name in ("block_size", "dp_size"):
            fields[name] = _number(text, name, value, _NUMBER_MAX)
        elif name == "replay":
            # May be given as vLLM's own settings have it; its host is that of the events.
            replay = split_tcp(value)
            fields["replay_port_base"] = replay[1] if replay else _number(text, name, value, _PORT_MAX)
        else:
            raise ConfigError(f"--kv-endpoint {text}: there is no option {name!r}; it must look like {_FORM}")
    return msgspec.convert(fields, KvSetting)


def _number(text: str, name: str, value: str, highest: int) -> int:
    if value.isascii() and value.isdecimal() and 1 <= int(value) <= highest:
        return int(value)
    raise ConfigError(f"--kv-endpoint {text}: {name} must be a number from 1 to {highest}, not {value!r}")


def _plain(url: str) -> str:
    return url.rstrip("/").lower()


def with_setting(facts: WorkerFacts | None, worker_url: str, settings: Sequence[KvSetting]) -> WorkerFacts | None:
    """What is known of a worker, completed by the settings; `facts` as they are when no setting speaks of it."""
    by_url = {setting.worker_url: setting for setting in settings}
    setting = by_url.get(_plain(worker_url)) or (by_url.get(None) if facts is None or facts.kv is None else None)
    if setting is None:
        return facts
    host = host_of(worker_url) if is_wildcard_host(setting.host) else setting.host.removeprefix("[").removesuffix("]")
    if host is None:
        return facts
    known = facts or _UNKNOWN
    endpoint = KvEndpoint(
        publisher="zmq",
        host=host,
        port_base=setting.port_base,
        topic=setting.topic,
        block_size=setting.block_size or known.page_size or _BLOCK_TOKENS,
        dp_size=setting.dp_size,
        replay_port_base=setting.replay_port_base,
    )
    return msgspec.structs.replace(known, kv=endpoint, dp_size=setting.dp_size, kv_connects_out=False)
