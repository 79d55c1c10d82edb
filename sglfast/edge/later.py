"""Paths that a shard answers itself, but not at once: their POST bodies need the tokenizer's thread.

Runs in: shards, event loop. Contract: a handler calls `then` exactly once, maybe before it returns, with a JSON body or a refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import orjson

from sglfast import errors
from sglfast.edge.explain import PREFIX, explain
from sglfast.edge.request import ENDPOINTS, Endpoint
from sglfast.edge.tokenize import Answer, detokenize, tokenize

if TYPE_CHECKING:
    from sglfast._httphead import RequestHead
    from sglfast.edge.shard import Shard

Handler = Callable[["Shard", "RequestHead", bytes, Callable[[Answer], None]], None]


def _explainer(endpoint: Endpoint) -> Handler:
    def handler(shard: Shard, head: RequestHead, body: bytes, then: Callable[[Answer], None]) -> None:
        def found(explanation: dict[str, Any] | errors.Reason) -> None:
            then((explanation, None) if isinstance(explanation, errors.Reason) else orjson.dumps(explanation))

        explain(shard, endpoint, body, found)

    return handler


LATER: dict[bytes, Handler] = {PREFIX + path: _explainer(endpoint) for path, endpoint in ENDPOINTS.items()} | {
    b"/v1/tokenize": tokenize,
    b"/v1/detokenize": detokenize,
}
