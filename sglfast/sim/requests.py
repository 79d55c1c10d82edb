"""Request bodies of the inference routes: which answer is asked for, and which requests SGLang refuses.

Runs in: sim. Contract: `parse_body` and `read` raise RequestError with status and message as the engine words it in kind (400
    for what is malformed); prompts themselves are read by sglfast.prompt. Fields that only change how a real model thinks
    (temperature, stop, logprobs, tools' parsers, ...) are accepted and have no effect.
"""

import uuid
from dataclasses import dataclass
from typing import Any

import orjson

from sglfast.prompt.keys import RequestKind
from sglfast.sim.output import MAX_OUTPUT_TOKENS
from sglfast.sim.settings import PORT_LIMIT

# SGLang's defaults when a request names no length: 16 for completions, 128 for /generate; a chat goes on until the model
# stops, which here is its natural length.
COMPLETIONS_DEFAULT_TOKENS = 16
GENERATE_DEFAULT_TOKENS = 128
ROOM_LIMIT = 2**64 - 1

INFERENCE_PATHS: dict[str, RequestKind] = {
    "/v1/chat/completions": RequestKind.CHAT,
    "/v1/completions": RequestKind.COMPLETIONS,
    "/generate": RequestKind.GENERATE,
    "/v1/embeddings": RequestKind.EMBEDDINGS,
}


class RequestError(Exception):
    """A request that the engine refuses. status: HTTP; kind: `type` of the OpenAI error object."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, besides its prompt.

    max_tokens: longest answer, None = until the model stops; ignores_eos: never stop before that; rank: None = any.
    index: of the choice; is_part: of a batch (batches.py).
    """

    kind: RequestKind
    request_id: str
    model: str
    is_stream: bool
    with_usage: bool
    max_tokens: int | None
    ignores_eos: bool
    rank: int | None
    index: int = 0
    is_part: bool = False


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Where the two workers of one request meet. port: of the prefill worker at `host`; room: 0 .. 2**64 - 1."""

    host: str
    port: int
    room: int


def parse_body(body: bytes, content_type: bytes, kind: RequestKind) -> dict[str, Any]:
    """Return the JSON object of a body. Raises RequestError."""
    # A router that loses this header breaks real engines, so the double refuses too; /generate does not care.
    if kind != RequestKind.GENERATE and content_type.partition(b";")[0].strip().lower() != b"application/json":
        raise _invalid("Unsupported Media Type: Only 'application/json' is allowed", ("header", "content-type"))
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _invalid(f"JSON decode error: {error}", ("body", error.pos)) from None
    if not isinstance(parsed, dict):
        raise _invalid("Input should be a valid dictionary", ("body",))
    return parsed


def read(kind: RequestKind, body: dict[str, Any], rank_header: bytes, default_model: str) -> Asked:
    """Return what a body asks for. Raises RequestError."""
    _require_prompt(kind, body)
    if kind == RequestKind.GENERATE:
        params = body.get("sampling_params") or {}
        if not isinstance(params, dict):
            raise RequestError(400, "sampling_params must be an object, or a list with one for each prompt")
        max_tokens = _count(params, "max_new_tokens", 0)
        max_tokens = GENERATE_DEFAULT_TOKENS if max_tokens is None else max_tokens
    else:
        params = body
        max_tokens = _count(body, "max_completion_tokens", 1)
        if max_tokens is None:
            max_tokens = _count(body, "max_tokens", 1)
        if max_tokens is None and kind == RequestKind.COMPLETIONS:
            max_tokens = COMPLETIONS_DEFAULT_TOKENS
    request_id, model = body.get("rid"), body.get("model")
    return Asked(
        kind=kind,
        request_id=request_id if isinstance(request_id, str) and request_id else new_request_id(),
        model=model if isinstance(model, str) and model else default_model,
        is_stream=_flag(body, "stream") and kind != RequestKind.EMBEDDINGS,
        with_usage=wants_usage(body),
        max_tokens=0 if kind == RequestKind.EMBEDDINGS else max_tokens,
        ignores_eos=_flag(params, "ignore_eos"),
        rank=_rank(body, b"" if kind == RequestKind.GENERATE else rank_header),
    )


def read_room(body: dict[str, Any]) -> int:
    """Return the room that a request to a prefill or decode worker names. Raises RequestError."""
    room = _only(body.get("bootstrap_room"))
    if room is None:
        raise RequestError(400, "Invalid request: Disaggregated request received without bootstrap room id.")
    if isinstance(room, bool) or not isinstance(room, int) or not 0 <= room <= ROOM_LIMIT:
        raise _invalid("Input should be an integer of 0 to 2**64 - 1", ("body", "bootstrap_room"))
    return room


def _only(value: Any) -> Any:
    """A list of one prompt may come with lists of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def read_bootstrap(body: dict[str, Any], default_port: int) -> Bootstrap:
    """Return where a decode worker finds its prompt. default_port: for a port that is absent or null. Raises RequestError."""
    room, host, port = read_room(body), _only(body.get("bootstrap_host")), _only(body.get("bootstrap_port"))
    if not isinstance(host, str) or not host:
        raise RequestError(400, "Invalid request: Disaggregated request received without bootstrap_host, the prefill worker's address.")
    if port is None:
        port = default_port
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= PORT_LIMIT:
        raise _invalid("Input should be a port, 1 to 65535, or null", ("body", "bootstrap_port"))
    return Bootstrap(host, port, room)


def wants_usage(body: dict[str, Any]) -> bool:
    """Return whether a stream is to end with what was used."""
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def new_request_id() -> str:
    """Return an id for a request that names none."""
    return uuid.uuid4().hex


def _require_prompt(kind: RequestKind, body: dict[str, Any]) -> None:
    if kind == RequestKind.GENERATE:
        if (body.get("text") is None) == (body.get("input_ids") is None):
            raise RequestError(400, "Either text or input_ids must be provided, and not both.")
        return
    field = {RequestKind.CHAT: "messages", RequestKind.COMPLETIONS: "prompt", RequestKind.EMBEDDINGS: "input"}[kind]
    if body.get(field) is None:
        raise _invalid("Field required", ("body", field))
    if kind == RequestKind.CHAT:
        if not isinstance(body[field], list):
            raise _invalid("Input should be a valid list", ("body", field))
        if not body[field]:
            raise RequestError(400, "Messages cannot be empty.")


def _count(fields: dict[str, Any], name: str, lowest: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise _invalid("Input should be a valid integer", ("body", name))
    if value < lowest:
        raise RequestError(400, f"{name} must be at least {lowest}, got {value}.")
    if value > MAX_OUTPUT_TOKENS:
        raise RequestError(400, f"{name} is too large: {value}, the simulator writes at most {MAX_OUTPUT_TOKENS} tokens.")
    return value


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise _invalid("Input should be a valid boolean", ("body", name))
    return value is True


def _rank(body: dict[str, Any], header: bytes) -> int | None:
    if header:
        try:
            return int(header)
        except ValueError:
            raise RequestError(400, f"Invalid X-Data-Parallel-Rank header: {header!r}") from None
    rank = _signed(body, "routed_dp_rank")
    return _signed(body, "data_parallel_rank") if rank is None else rank


def _signed(body: dict[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise _invalid("Input should be a valid integer", ("body", name))
    return value


def _invalid(message: str, location: tuple[str | int, ...]) -> RequestError:
    """Return the error of the engine's schema check."""
    return RequestError(400, f"1 validation error: {{'loc': {location}, 'msg': {message!r}}}", "Bad Request")
