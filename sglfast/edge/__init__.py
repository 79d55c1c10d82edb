"""HOT: the request path. A shard's client connections, the choice of a worker, the relay.

The law of this folder:
* bytes in, bytes out: a body is parsed only for a policy that needs its prompt, and is sent on as it came;
* nothing blocks the loop: long tokenization goes to a bounded thread pool, names are resolved by the loop;
* no exception, no log line above DEBUG and no time() call for a normal chunk; timeouts are kept by one sweep of the shard;
* nothing grows with the number of workers or the length of the prompt unless a comment beside it says why;
* every Exchange ends exactly once, and that gives back its counters, its connection and its place in the sweep.
Third-party packages here: uvloop, httptools, msgspec and orjson; nothing else is loaded by a shard (tests/test_floors.py).

Reading order: server (client connection) -> request (bytes to facts) -> route and policy/ -> exchange -> upstream.
"""
