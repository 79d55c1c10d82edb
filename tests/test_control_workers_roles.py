"""The worker table's owner: what each worker is there for, and whether prefill and decode workers fit each other."""

from test_control_workers import SILENT, facts, pool, spoken

from sglfast._workers import READY
from sglfast.control.roles import Named
from sglfast.control.workers import Workers
from sglfast.shm import read_workers


def role_of(workers: Workers, worker_idx: int) -> tuple[str, int | None, bool]:
    record = workers.view(worker_idx).record
    return record.role, record.bootstrap_port, workers.lacks_port(worker_idx)


def test_the_role_is_as_it_was_named_until_the_worker_speaks() -> None:
    with pool(0) as (workers, table, seen):
        idx = workers.register("http://p:1", named=Named("prefill", 9000, True))
        assert role_of(workers, idx) == ("prefill", 9000, False)
        workers.learn(idx, SILENT)
        workers.learn(idx, spoken(None))  # an engine without /server_info
        assert role_of(workers, idx) == ("prefill", 9000, False)
        generation = read_workers(table)[0].generation
        workers.set_state(idx, READY)
        assert workers.learn(idx, spoken(facts(disaggregation_mode="prefill", disaggregation_bootstrap_port=8998)))
        assert role_of(workers, idx) == ("prefill", 8998, False)
        assert seen.text.count("its bootstrap port is 8998, as it says itself, not 9000") == 1
        # Another engine behind the URL: the same slot, the same generation, nothing of it is lost.
        assert workers.learn(idx, spoken(facts(disaggregation_mode="decode", kv=False)))
        (view,) = read_workers(table)
        assert (view.record.role, view.record.bootstrap_port, view.generation, view.state) == ("decode", None, generation, READY)
        workers.learn(idx, SILENT)
        assert role_of(workers, idx) == ("decode", None, False)
        workers.learn(idx, spoken(facts(disaggregation_mode="null")))
        assert role_of(workers, idx) == ("regular", None, False)


def test_a_port_that_nobody_tells_is_lacking() -> None:
    with pool(0) as (workers, _, seen):
        idx = workers.register("http://p:1", named=Named("prefill"))
        none = workers.register("http://q:1", named=Named("prefill", None, True))
        assert (role_of(workers, idx), role_of(workers, none)) == (("prefill", None, True), ("prefill", None, False))
        workers.learn(idx, SILENT)
        for _ in range(3):
            workers.learn(idx, spoken(facts(disaggregation_mode="prefill")))
        assert role_of(workers, idx) == ("prefill", None, True)
        assert seen.text.count("not on which bootstrap port") == 1, "the same is told once"
        workers.learn(idx, spoken(facts(disaggregation_mode="prefill", disaggregation_bootstrap_port=1)))
        assert role_of(workers, idx) == ("prefill", 1, False)
        workers.learn(idx, spoken(facts(disaggregation_mode="prefill")))
        workers.remove(idx)
        assert not workers.lacks_port(idx)


def test_events_of_prefill_and_decode_workers_are_followed_where_they_publish() -> None:
    with pool(3) as (workers, table, _):
        workers.learn(0, spoken(facts(disaggregation_mode="prefill", disaggregation_bootstrap_port=1)))
        workers.learn(1, spoken(facts(disaggregation_mode="decode")))
        workers.learn(2, spoken(facts(disaggregation_mode="decode", kv=False)))
        assert [(view.record.role, view.block_size) for view in read_workers(table)] == [("prefill", 64), ("decode", 64), ("decode", 0)]


def test_pairs_that_do_not_fit_are_told_once() -> None:
    with pool(3) as (workers, _, seen):
        prefill = facts(disaggregation_mode="prefill", disaggregation_bootstrap_port=1, tp_size=8)
        decode = facts(disaggregation_mode="decode", tp_size=4)
        workers.learn(0, spoken(prefill))
        workers.learn(1, spoken(facts(disaggregation_mode="decode", tp_size=4, model="m2"), "m2"))
        workers.learn(2, spoken(facts(tp_size=2)))
        assert "differ" not in seen.text, "another model, and a regular worker, have nothing to do with it"
        for _ in range(3):
            workers.learn(1, spoken(decode))
        assert seen.text.count("prefill and decode workers differ in tp_size (4: http://10.0.0.1:30000; 8: http://10.0.0.0:30000)") == 1
        workers.remove(1)
        workers.learn(0, spoken(prefill))
        assert seen.text.count("differ") == 1
