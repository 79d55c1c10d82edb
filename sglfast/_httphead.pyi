from typing import final

MORE: int
UNUSUAL: int
TOO_LARGE: int

@final
class RequestHead:
    method: bytes
    target: bytes
    kept: bytes
    request_id: bytes | None
    origin: bytes | None
    has_request_id: bool
    content_length: int
    head_bytes: int
    n_hosts: int
    is_chunked: bool
    keeps_alive: bool
    is_http10: bool
    expects_continue: bool
    expects_other: bool
    wants_kv: bool
    names_rank: bool

@final
class ResponseHead:
    status: int
    kept: bytes
    content_length: int
    head_bytes: int
    is_chunked: bool
    keeps_alive: bool
    has_request_id: bool
    is_event_stream: bool

@final
class Chunks:
    def follow(self, data: bytes, start: int = 0) -> int: ...
    def decode(self, data: bytes, start: int, pieces: list[bytes]) -> int: ...
    @property
    def is_between(self) -> bool: ...

__pyx_capi__: dict[str, object]  # the C functions, for _relay

def scan_request(data: bytes, limit: int) -> RequestHead | int: ...
def scan_response(data: bytes, limit: int) -> ResponseHead | int: ...
