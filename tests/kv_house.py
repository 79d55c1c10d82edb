"""A tree and a subscriber's threads beside a publisher, for the tests of index/subscriber."""

import logging
import mmap
from dataclasses import dataclass

import zmq
from kv_publisher import BLOCK_SIZE, Publisher, keys_of, wait_until

from sglfast import _counters as words
from sglfast._counters import RankTable
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast._segment import Segment, segment_bytes
from sglfast.index.held import Limits
from sglfast.index.rank import RankIndex, TreeLock
from sglfast.index.subscriber import Endpoints, Subscriber

SIZES = {"max_workers": 2, "max_ranks": 64, "max_shards": 1, "capacity_blocks": 4096}
RANK = 5
# Long, so that a busy machine is no silent engine; the tests of silence say so.
LIMITS = Limits(replay_timeout_s=30.0)
SHORT = Limits(replay_timeout_s=0.1, max_tries=2)


@dataclass
class Follower:
    """A subscriber on a tree, seen through the tree and the rank's row."""

    subscriber: Subscriber
    index: RankIndex
    ranks: RankTable
    reader: TreeReader

    def word(self, word: int) -> int:
        return self.ranks.get(self.index.rank, word)

    @property
    def state(self) -> tuple[int, int]:
        return self.word(words.R_STATE), self.word(words.R_REASON)

    def overlap(self, conversation: int, n_blocks: int = 4) -> int:
        self.reader.match(keys_of(conversation, n_blocks))
        return self.reader.overlap(self.index.rank)


class House:
    """A context, a tree and all that a test starts."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.segment = Segment.format(mmap.mmap(-1, segment_bytes(**SIZES)), **SIZES)
        self.tree = TreeLock(TreeWriter(self.segment))
        self.publishers: list[Publisher] = []
        self.followers: list[Follower] = []

    def publisher(self, *, has_replay: bool, **more: object) -> Publisher:
        publisher = Publisher(self.context, has_replay=has_replay, **more)  # type: ignore[arg-type]
        self.publishers.append(publisher)
        return publisher

    def follow(
        self, live: str, replay: str | None, *, rank: int = RANK, topic: bytes = b"", is_bigram: bool = False, limits: Limits = LIMITS
    ) -> Follower:
        log = logging.LoggerAdapter(logging.getLogger("test.subscriber"), {})
        index = RankIndex(self.tree, rank, block_size=BLOCK_SIZE, is_bigram=is_bigram, log=log)
        ranks = RankTable(self.segment)
        endpoints = Endpoints(live, replay, topic)
        subscriber = Subscriber(self.context, endpoints, index, ranks, generation=9, log=log, limits=limits)
        follower = Follower(subscriber, index, ranks, TreeReader(self.segment))
        self.followers.append(follower)
        subscriber.start()
        return follower

    def joined(self, publisher: Publisher, *, limits: Limits = LIMITS) -> Follower:
        """A follower of the publisher whose subscription has arrived, at rest."""
        follower = self.follow(publisher.endpoint, publisher.replay_endpoint, topic=publisher.topic, limits=limits)
        self.subscribed(publisher)
        return follower

    def subscribed(self, publisher: Publisher) -> None:
        wait_until(lambda: publisher.n_subscriptions == 1, publisher, what="the subscription")

    def close(self) -> None:
        for follower in self.followers:
            follower.subscriber.stop()
            follower.subscriber.wipe()
        ended = [follower.subscriber.join(5.0) for follower in self.followers]
        for publisher in self.publishers:
            publisher.close()
        assert all(ended)
        self.context.term()
