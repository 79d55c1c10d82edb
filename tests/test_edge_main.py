"""sglfast.edge.main: a shard as a process, from its boot to its end."""

import os
import signal
import threading
import time
from contextlib import ExitStack

import orjson
import pytest
from edge_harness import Edge, settled, wait_until
from raw_client import WAIT_S, Client, chunk, post, request
from scripted_worker import SSE_HEAD, Call, Worker, answer, answer_head, late, says
from test_edge_exchange_failures import error_event, split_chunks

from sglfast import _counters as c
from sglfast._counters import RANK_EXACT, RankTable
from sglfast._hashtree import TreeWriter
from sglfast.prompt.keys import PromptReader, RequestKind
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer

MB = 1 << 20


def test_says_who_it_is_and_that_it_lives(worker: Worker) -> None:
    with Edge([worker]) as edge, settled(edge):
        info = edge.segment.process_info(1)
        assert edge.process.pid in info
        assert edge.is_ready
        wait_until(lambda: edge.segment.process_info(1) != info, "the heart beats")
        assert edge.rss_bytes() < 60 * MB


def test_signals_do_not_end_it(worker: Worker) -> None:
    """A terminal's Ctrl-C and a service manager's SIGTERM reach control, which drains first."""
    with Edge([worker]) as edge, settled(edge):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(edge.process.pid, number)
        time.sleep(0.1)
        assert edge.ask(post(b"still here")).body == b"still here"


@pytest.mark.parametrize("word", [b"q", b""], ids=["told to", "control is gone"])
def test_stops(word: bytes, worker: Worker) -> None:
    """What has been written is still sent, then the process ends by itself."""
    with Edge([worker]) as edge, edge.client() as idle, edge.client() as busy:
        idle.ask(request("GET", "/health"))
        worker.plan(lambda call: call.send(SSE_HEAD + chunk(b"data: 1\n\n")))
        busy.send(post())
        busy.read_until(chunk(b"data: 1\n\n"))
        if word:
            edge.control.send(word)
        else:
            edge.control.close()
        assert edge.process.wait(WAIT_S) == 0
        assert idle.has_ended()
        ended_by_an_event(busy)
        assert edge.log() == ""
    worker.reset()


def ended_by_an_event(client: Client) -> None:
    """The stream is well-formed to its end, and that says why."""
    event, last = split_chunks(client)
    error_event(event, "shutting_down")
    assert last == b""
    assert client.has_ended()


def test_who_waits_when_it_stops_is_told_so(worker: Worker) -> None:
    """Also who waits for a worker's first byte, or for his turn; what is in the middle of a chunk can only be cut."""
    event = b"data: 1\n\n"
    pieces = [SSE_HEAD + chunk(event), SSE_HEAD + chunk(event) + chunk(event)[:-4], answer_head("content-length: 30") + b"12"]
    worker.plan(*(says(piece) for piece in pieces), lambda call: None)
    with Edge([worker], worker_max_in_flight=4, queue_size=4) as edge, ExitStack() as clients:
        stream, split, short, silent, queued = (clients.enter_context(edge.client()) for _ in range(5))
        for number, client in enumerate((stream, split, short, silent), 1):
            client.send(post())
            worker.wait_calls(number)
        queued.send(post())
        wait_until(lambda: edge.word(c.S_WAITING) == 1, "the last one waits")
        for client, last in ((stream, chunk(event)), (split, chunk(event) + chunk(event)[:-4]), (short, b"\r\n\r\n12")):
            client.read_until(last)
        edge.control.send(b"q")
        assert edge.process.wait(WAIT_S) == 0
        ended_by_an_event(stream)
        for client in (split, short):
            assert client.read_to_end() == b""
        for client in (silent, queued):
            found = client.read_answer()
            assert (found.status, found.code, found.closes) == (503, "shutting_down", True)
            assert client.has_ended()
        assert len(worker.calls) == 4, "nobody takes the places that become free"
        assert not {name: value for name, value in edge.gauges().items() if "CONNECTIONS" not in name}
        assert edge.word(c.S_STREAMS_CUT) == 3
        assert edge.log() == ""
    worker.reset()


def test_a_client_that_does_not_read_does_not_keep_it(worker: Worker) -> None:
    worker.plan(says(SSE_HEAD, *[chunk(b"x" * 65_536)] * 500))
    with Edge([worker]) as edge, edge.client(rcvbuf_bytes=4096) as deaf, edge.client() as other:
        deaf.send(post())
        worker.wait_calls(1)
        wait_until(lambda: worker.calls[0].sent_bytes > 200_000, "more than its client's kernel takes is on the way")
        worker.plan(says(SSE_HEAD + chunk(b"data: 1\n\n")))
        other.send(post())
        other.read_until(chunk(b"data: 1\n\n"))
        edge.control.send(b"q")
        assert edge.process.wait(WAIT_S) == 0
        ended_by_an_event(other)
    worker.errors.clear()
    worker.reset()


def test_takes_what_is_in_the_listening_queue(worker: Worker) -> None:
    """The socket listened before the shard ran, so nobody is refused while it starts or restarts."""
    with Edge([worker]) as edge, settled(edge):
        os.kill(edge.process.pid, signal.SIGSTOP)
        with edge.client() as client:
            client.send(post(b"early"))
            os.kill(edge.process.pid, signal.SIGCONT)
            assert client.read_answer().body == b"early"


def test_two_shards_share_port_and_counters(worker: Worker) -> None:
    """A second column in the same memory: loads are sums."""
    with Edge([worker], shards=2) as edge, settled(edge):
        assert edge.config.shards == 2
        worker.plan(late(0.2, answer(b"")))
        with edge.client() as client:
            client.send(post())
            wait_until(lambda: edge.worker_word(0, c.W_INFLIGHT_REQUESTS) == 1, "counted in its own column")
            client.read_answer()


def test_kv_aware_from_the_body_to_the_header(worker: Worker) -> None:
    """Tokenizer, keys, hash tree, policy and header of a real process; the test plays index."""
    second = Worker("second")
    body = orjson.dumps({"model": "demo", "messages": [{"role": "user", "content": "tell me of the sea " * 40}]})
    long_body = orjson.dumps({"model": "demo", "messages": [{"role": "user", "content": "tell me of the sea " * 4000}]})
    reader = PromptReader(load_tokenizer(DEMO_TOKENIZER_PATH))
    with (
        Edge([worker, second], block_size=16, policy="cache_aware", tokenizer_path=DEMO_TOKENIZER_PATH) as edge,
        settled(edge),
        edge.client() as client,
    ):
        writer, ranks = TreeWriter(edge.segment), RankTable(edge.segment)
        for rank, each in ((1, body), (0, long_body)):
            tokens = reader.tokens_of(reader.text_of(RequestKind.CHAT, orjson.loads(each)))
            writer.store(rank, 0, reader.keys_of(tokens, 16))
            ranks.set(rank, c.R_STATE, RANK_EXACT)
            blocks, all_blocks = (len(tokens) - 1) // 16, len(tokens) // 16
            for _ in range(3):
                [value] = client.ask(post(each, "x-sglfast-kv: 1")).header("x-sglfast-kv")
                expected = f"worker={edge.urls[rank]}; rank=0; overlap_blocks={blocks}; prompt_blocks={all_blocks}; state=EXACT"
                assert value.decode() == expected
        assert ([call.body for call in second.calls], [call.body for call in worker.calls]) == ([body] * 3, [long_body] * 3)
        assert edge.word(c.S_PROMPTS_KEYED) == 6
        assert edge.rss_bytes() < 80 * MB
        for junk in (b"", b"[", b"null", b'{"messages":[{"role":"user"}]}', b"[" * 10_000, b"\xff" * 10_000):
            assert client.ask(post(junk)).body == junk, "whatever it is, it is the worker's to judge"
    second.close()


def test_health_does_not_wait_for_the_tokenizer(worker: Worker) -> None:
    # No place to cut and nothing that merges in C know: all of it goes through the tokenizer at once.
    body = orjson.dumps({"prompt": "".join(chr(0x4E00 + number * 7919 % 20_000) for number in range(300_000))})
    with (
        Edge([worker], block_size=64, policy="cache_aware", tokenizer_path=DEMO_TOKENIZER_PATH) as edge,
        settled(edge),
        edge.client() as client,
    ):
        client.send(post(body, target="/v1/completions"))
        asked = 0
        reading = threading.Thread(target=client.read_answer)
        reading.start()
        while reading.is_alive():
            start = time.monotonic()
            assert edge.ask(request("GET", "/health")).status == 200
            assert time.monotonic() - start < 5.0
            asked += 1
        reading.join()
        assert asked > 10


def test_streams_that_are_left_at_random_leave_no_memory(worker: Worker) -> None:
    """RSS is flat over the second half of many streams; half of them are left in the middle."""

    def script(call: Call) -> None:
        call.send(SSE_HEAD)
        for _ in range(4):
            call.send(chunk(b"data: " + b"x" * 500 + b"\n\n"))
        call.send(chunk(b""))

    worker.plan(script)
    with Edge([worker]) as edge:
        sizes: list[int] = []
        for turn in range(1200):
            with edge.client() as client:
                client.send(post(b"y" * 5000))
                if turn % 2:
                    client.read_head()
                else:
                    client.read_answer()
            if turn in (600, 1199):
                sizes.append(edge.rss_bytes())
        assert sizes[1] - sizes[0] < 2 * MB
        edge.settle()
