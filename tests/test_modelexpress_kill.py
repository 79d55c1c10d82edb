"""kill -9 of services and of Redis while seeds publish: what was acknowledged is there afterwards, and nothing is there in half.

Every publisher writes records whose tensors all carry the number of the publish, so that a mixture would show. It keeps, for each
worker, the last number that was acknowledged and the last that was tried.
"""

import asyncio
import contextlib
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc
import pytest
from mx_harness import NO_REDIS, REDIS, Client, RedisServer, ServeProcess, publication, redis_server, until

from sglfast.modelexpress.roster import READY, UNKNOWN
from sglfast.modelexpress.schema import p2p

WORKERS, TENSORS = 6, 3000
needs_redis = pytest.mark.skipif(REDIS is None, reason=NO_REDIS)


class Seed:
    """Publishes worker `n` again and again, and says READY after every second publish."""

    def __init__(self, n: int) -> None:
        self.worker_id, self.rank = f"worker-{n}", n
        self.tried = self.acknowledged = 0
        self.possible = {UNKNOWN}  # statuses of the acknowledged publish
        self.source_id = ""

    def request(self, number: int) -> p2p.PublishMetadataRequest:
        tensors = [p2p.TensorDescriptor(name=f"t{i}", addr=number, size=i, device_id=self.rank) for i in range(TENSORS)]
        return publication(worker_id=self.worker_id, rank=self.rank, tensors=tensors, agent_name=str(number))

    async def step(self, client: Client) -> None:
        self.tried += 1
        answer = await client.publish(self.request(self.tried))
        if not answer.success:
            return
        self.acknowledged, self.possible, self.source_id = self.tried, {UNKNOWN}, answer.mx_source_id
        if self.tried % 2:
            self.possible = {UNKNOWN, READY}
            if (await client.update(self.source_id, self.worker_id, self.rank, READY)).success:
                self.possible = {READY}

    async def run(self, client: Client) -> None:
        while True:
            with contextlib.suppress(grpc.RpcError):
                await self.step(client)
            await asyncio.sleep(0.001)

    async def check(self, client: Client) -> None:
        """What is served is the acknowledged publish or a later one, whole, with a status that belongs to it."""
        answer = await client.get(self.source_id, self.worker_id)
        assert answer.found, f"{self.worker_id}: publish {self.acknowledged} was acknowledged and is gone"
        number = int(answer.worker.agent_name)
        assert self.acknowledged <= number <= self.tried
        whole = self.request(number).worker
        assert list(answer.worker.tensors) == list(answer.worker.tensor_source.tensors) == list(whole.tensors)
        assert answer.worker.status in (self.possible if number == self.acknowledged else {UNKNOWN})
        assert answer.worker.updated_at > 0
        self.acknowledged = number  # seen once, it must be seen again
        self.possible = {int(answer.worker.status)}


async def publish_until_killed(addresses: list[str], seeds: list[Seed], kill_now: Callable[[], object]) -> None:
    """Seeds share the addresses; after some of their publishes were acknowledged, `kill_now()` is called in the midst of the others."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(address)) for address in addresses]
        tasks = [asyncio.create_task(seed.run(clients[seed.rank % len(clients)])) for seed in seeds]
        enough = [seed.acknowledged + 3 for seed in seeds]
        await until(lambda: all(seed.acknowledged >= wanted for seed, wanted in zip(seeds, enough, strict=True)), "publishes", 60)
        await asyncio.to_thread(kill_now)
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def check_all(address: str, seeds: list[Seed]) -> None:
    async with Client(address) as client:
        for seed in seeds:
            await seed.check(client)
        listed = await client.list()
        assert {ref.worker_id for ref in listed} == {seed.worker_id for seed in seeds}
        for seed in seeds:
            assert (await client.update(seed.source_id, seed.worker_id, seed.rank, READY)).success
            seed.possible = {READY}
        assert len(await client.list(status_filter=READY)) == len(seeds)


def test_the_embedded_service_killed_in_mid_publish(tmp_path: Path) -> None:
    seeds = [Seed(n) for n in range(WORKERS)]
    for _ in range(3):
        service = ServeProcess("--storage", str(tmp_path / "db"), log=tmp_path / "log")
        asyncio.run(publish_until_killed([service.address], seeds, partial(service.end, signal.SIGKILL)))
        service = ServeProcess("--storage", str(tmp_path / "db"), log=tmp_path / "log")
        try:
            asyncio.run(check_all(service.address, seeds))
        finally:
            assert service.end() == 0


@needs_redis
def test_either_of_two_services_on_one_redis_killed(tmp_path: Path) -> None:
    seeds = [Seed(n) for n in range(WORKERS)]
    with redis_server(tmp_path / "redis") as redis:
        flags = ("--storage", redis.url)
        services = [ServeProcess(*flags, log=tmp_path / "log") for _ in range(2)]
        try:
            for victim in (0, 1):
                other = services[1 - victim]
                addresses = [service.address for service in services]
                asyncio.run(publish_until_killed(addresses, seeds, partial(services[victim].end, signal.SIGKILL)))
                asyncio.run(check_all(other.address, seeds))
                services[victim] = ServeProcess(*flags, log=tmp_path / "log")
                asyncio.run(check_all(services[victim].address, seeds))
        finally:
            for service in services:
                service.end()


@needs_redis
def test_redis_killed_under_two_services(tmp_path: Path) -> None:
    seeds = [Seed(n) for n in range(WORKERS)]
    with redis_server(tmp_path / "redis") as redis:
        services = [ServeProcess("--storage", redis.url, log=tmp_path / "log") for _ in range(2)]
        try:
            addresses = [service.address for service in services]
            for _ in range(2):
                asyncio.run(publish_until_killed(addresses, seeds, redis.end))
                asyncio.run(in_band_while_down(redis, addresses))
                redis.start()
                for address in addresses:
                    asyncio.run(check_all(address, seeds))
        finally:
            for service in services:
                assert service.end() == 0


async def in_band_while_down(redis: RedisServer, addresses: list[str]) -> None:
    for address in addresses:
        async with Client(address) as client:
            answer = await client.publish(publication())
            assert not answer.success
            assert answer.message.startswith("Failed to publish metadata: Redis at 127.0.0.1: ")
            assert await client.list() == []


@needs_redis
def test_publish_on_one_list_on_the_other(tmp_path: Path) -> None:
    async def main(one: str, two: str) -> None:
        async with Client(one) as here, Client(two) as there:
            for n in range(30):
                answer = await here.publish(publication(worker_id=f"w{n}"))
                assert f"w{n}" in {ref.worker_id for ref in await there.list()}
                await there.update(answer.mx_source_id, f"w{n}", 0, READY)
                assert next(ref.worker_id for ref in await here.list(status_filter=READY)) == f"w{n}"
                assert (await there.get(answer.mx_source_id, f"w{n}")).worker.status == READY

    with redis_server(tmp_path / "redis") as redis:
        services = [ServeProcess("--storage", redis.url, log=tmp_path / "log") for _ in range(2)]
        try:
            asyncio.run(main(services[0].address, services[1].address))
        finally:
            for service in services:
                assert service.end() == 0
