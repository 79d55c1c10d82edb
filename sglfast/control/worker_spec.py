"""What an operator says of a worker: the body of POST and PUT /workers, and of a flag.

Runs in: control. Contract: a body is read strictly where a field has a meaning here and leniently where it has none: those fields are
    named to the caller (`ignored`), never dropped silently. Errors name the field and never quote a key. Field names and
    defaults: spec/gateway.md 1.5 (POST /workers of sglang-router 0.3.2).
Effect here: url, model_id, api_key, worker_type, bootstrap_port, the five health fields and disable_health_check act; priority, cost and
    labels are kept and shown. A bootstrap_port of null says nothing, as a client's typed model writes it; "none" says that there is none.
"""

from typing import Any, Literal, TypeVar

import msgspec

from sglfast.config.checks import is_key
from sglfast.config.worker_urls import NamedWorker, worker_url
from sglfast.control.roles import Named
from sglfast.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)

_UNKNOWN_MODEL = "unknown"  # how a worker without a model's name is shown; a client may send it back
_KEY_LIMIT_BYTES = 800  # URL, model's name and key fit into a worker's slot together
_NAME_LIMIT_CHARACTERS = 512
_LABELS_LIMIT, _LABEL_LIMIT_CHARACTERS = 64, 256
_NUMBERS = ("health_check_timeout_secs", "health_check_interval_secs", "health_success_threshold", "health_failure_threshold")
# Meant for gRPC or for a router that parses answers: none of these is here.
_WITHOUT_EFFECT = frozenset({"tokenizer_path", "reasoning_parser", "tool_parser", "chat_template"})
_TYPES = ("regular", "prefill", "decode")
_NO_PORT = "none"
_IMPLIED: dict[str, frozenset[object]] = {
    "worker_type": frozenset({None, "regular"}),
    "runtime": frozenset({None, "sglang", "vllm"}),
    "connection_mode": frozenset({None, "http", "HTTP"}),
    "dp_aware": frozenset({None, False, True}),
}


class SpecError(ValueError):
    """A body that says nothing that can be done; the text is for the client."""


class HealthChange(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker is checked, where it is not to be as the flags say. None = as they say."""

    health_check_timeout_secs: float | None = None
    health_check_interval_secs: float | None = None
    health_success_threshold: int | None = None
    health_failure_threshold: int | None = None
    disable_health_check: bool | None = None


class WorkerSpec(HealthChange, frozen=True, kw_only=True):
    """A worker as it was asked for. url: scheme, host and port; model_id: None = as the worker says; api_key: None = as the flags say.

    worker_type: unless the worker says something else; bootstrap_port: of a prefill worker, None = as it says, "none" = it has none.
    """

    url: str
    worker_type: Literal["regular", "prefill", "decode"] = "regular"
    bootstrap_port: int | Literal["none"] | None = None
    model_id: str | None = None
    api_key: str | None = None
    priority: int = 50
    cost: float = 1.0
    labels: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"WorkerSpec({self.url})"  # the rest may hold a key

    @property
    def named(self) -> Named:
        """What the worker is said to be there for."""
        port = self.bootstrap_port
        return Named(self.worker_type, port if isinstance(port, int) else None, is_port_known=port is not None)


class WorkerChange(HealthChange, frozen=True, kw_only=True):
    """What is to change of a worker. None = nothing; labels: added to those it has; api_key: empty = the flags' again.

    state: "draining" = no new requests, "ready" = as its health says.
    """

    api_key: str | None = None
    priority: int | None = None
    cost: float | None = None
    labels: dict[str, str] | None = None
    state: Literal["ready", "draining"] | None = None

    def __repr__(self) -> str:
        return "WorkerChange(...)"


def spec_of(worker: NamedWorker) -> WorkerSpec:
    """What a flag asks for."""
    port = worker.bootstrap_port or _NO_PORT if worker.is_port_known else None
    return WorkerSpec(url=worker.url, worker_type=worker.role, bootstrap_port=port)  # type: ignore[arg-type]


def read_spec(body: bytes) -> tuple[WorkerSpec, list[str]]:
    """(what was asked for, names of the fields that have no effect) of a POST body. Raises SpecError."""
    fields, ignored = _object(body, WorkerSpec)
    spec = _converted(fields, WorkerSpec)
    try:
        url = worker_url(spec.url, "url")
    except ConfigError as error:
        raise SpecError(str(error)) from None
    model_id = spec.model_id if spec.model_id not in ("", _UNKNOWN_MODEL) else None
    if model_id is not None and (len(model_id) > _NAME_LIMIT_CHARACTERS or not model_id.isprintable()):
        raise SpecError(f"model_id: must be printable and at most {_NAME_LIMIT_CHARACTERS} characters")
    if isinstance(spec.bootstrap_port, int) and not 1 <= spec.bootstrap_port <= 65_535:
        raise SpecError('bootstrap_port: must be a number from 1 to 65535, or "none"')
    _check(spec.api_key or None, spec.labels, spec)
    return msgspec.structs.replace(spec, url=url, model_id=model_id, api_key=spec.api_key or None), ignored


def read_change(body: bytes) -> tuple[WorkerChange, list[str]]:
    """(what is to change, names of the fields that have no effect) of a PUT body. Raises SpecError."""
    fields, ignored = _object(body, WorkerChange)
    change = _converted(fields, WorkerChange)
    _check(change.api_key or None, change.labels or {}, change)
    return change, ignored


def changed(spec: WorkerSpec, change: WorkerChange) -> WorkerSpec:
    """The worker as it is asked for after a change. Raises SpecError when it has too many labels then."""
    given = {name: value for name, value in msgspec.structs.asdict(change).items() if value is not None and name != "state"}
    if change.labels is not None:
        given["labels"] = _check_labels(spec.labels | change.labels)
    if change.api_key is not None:
        given["api_key"] = change.api_key or None
    return msgspec.structs.replace(spec, **given)


def _object(body: bytes, kind: type[msgspec.Struct]) -> tuple[dict[str, Any], list[str]]:
    """The fields of `kind` in a JSON object, and the names of those without effect."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise SpecError("the body must be a JSON object") from None
    known = {field.name for field in msgspec.structs.fields(kind)}
    if fields.get("runtime") == "external":
        raise SpecError("runtime: external providers are not offered; give sglang or vllm")
    # A type that there is not means regular, as for sglang-router.
    if fields.get("worker_type") not in _TYPES:
        known.discard("worker_type")
    if fields.get("worker_type") != "prefill" or fields.get("bootstrap_port") is None:
        known.discard("bootstrap_port")
    rest = {name: value for name, value in fields.items() if name not in known}
    ignored = [name for name, value in rest.items() if not _is_implied(name, value)]
    return {name: value for name, value in fields.items() if name in known}, sorted(name[:64] for name in ignored)


def _is_implied(name: str, value: object) -> bool:
    """Whether a field that is not kept says only what is so anyway."""
    if name in _WITHOUT_EFFECT or name == "bootstrap_port":
        return value is None
    try:
        return value in _IMPLIED.get(name, frozenset())
    except TypeError:  # a list or an object
        return False


def _converted(fields: dict[str, Any], kind: type[T]) -> T:
    required = {field.name for field in msgspec.structs.fields(kind) if field.required}
    # An explicit null is what a client's typed model writes for "not given".
    given = {name: value for name, value in fields.items() if value is not None or name in required}
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise SpecError(str(error).replace("Object missing", "the body is missing").replace("`$.", "`")) from None


def _check(api_key: str | None, labels: dict[str, str], health: HealthChange) -> None:
    if api_key is not None and not (is_key(api_key) and len(api_key) <= _KEY_LIMIT_BYTES):
        raise SpecError(f"api_key: must be visible ASCII characters without blanks, at most {_KEY_LIMIT_BYTES}")
    _check_labels(labels)
    for name in _NUMBERS:
        value = getattr(health, name)
        if value is not None and not (value >= 1 if isinstance(value, int) else 0.1 <= value <= 86_400):
            raise SpecError(f"{name}: must be at least {'1' if isinstance(value, int) else '0.1 and at most 86400'}")


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    if len(labels) > _LABELS_LIMIT or any(len(text) > _LABEL_LIMIT_CHARACTERS for pair in labels.items() for text in pair):
        raise SpecError(f"labels: at most {_LABELS_LIMIT}, each of at most {_LABEL_LIMIT_CHARACTERS} characters")
    return labels
