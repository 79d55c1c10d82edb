"""When live batches may be applied by the one who reads them: never while a stream is anything but at rest."""

from stream_bench import Bench

from sglfast.index.held import Limits
from sglfast.index.stream import RankStream


def test_only_a_stream_at_rest_is_steady() -> None:
    bench = Bench(has_replay=True)
    stream = bench.stream

    def steady() -> int | None:
        return stream.steady_seq

    assert steady() is None  # nothing is known yet
    bench.connect()
    assert steady() is None  # a replay is under way
    bench.replay(end=True)
    assert steady() == 0
    bench.live(0, 1)
    assert steady() == 2
    stream.on_disconnected()
    assert steady() is None
    stream.on_connected(bench.now_s)
    assert steady() is None
    bench.replay(1, 2, end=True)
    assert steady() == 3
    bench.live(5)
    assert steady() is None  # a gap
    bench.replay(2, 3, 4, end=True)
    assert steady() == 6
    bench.live(0, run=1)
    assert steady() == 1


def test_no_stream_is_steady_before_its_number_shows_that_it_is_the_same() -> None:
    bench = Bench(has_replay=False)
    bench.live(0, 1, 2)
    bench.reconnect()
    assert bench.stream.steady_seq is None
    resumed = RankStream(bench.sink, has_replay=False, resume=bench.stream.resume)
    assert resumed.steady_seq is None
    resumed.on_connected(0.0)
    assert resumed.steady_seq is None


def test_steady_again_behind_a_hole_that_was_given_up() -> None:
    bench = Bench(has_replay=True, limits=Limits(replay_timeout_s=1.0, max_tries=1))
    bench.live(0, 5)
    assert bench.replay(0, end=True) == ["clear", 5]
    assert bench.stream.steady_seq == 6
