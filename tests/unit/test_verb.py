"""Data-parallel replicas take a new configuration together or not at all, whatever each of them is doing."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from test_reconfigure import layers_of, served

from lethe_sglang.config import ConfigError
from lethe_sglang.config.changes import reconfigured

verb = pytest.importorskip("lethe_sglang.engine.verb")


class Running:
    """A request."""

    def finished(self):
        return False


class Replica:
    """A scheduler with a runtime, and the requests that it runs."""

    def __init__(self):
        self.runtime, _ = served()
        self.running = set()
        self.scheduler = SimpleNamespace(
            collect_inflight_reqs=lambda: set(self.running),
            chunked_req=None,
            waiting_queue=[],
            grammar_manager=SimpleNamespace(grammar_queue=[]),
            last_batch=None,
            running_batch=SimpleNamespace(reqs=[]),
        )

    def run(self):
        self.running.add(Running())
        return self


class Front:
    """What the verb uses of SGLang's tokenizer manager: its gate, its lock, and a line to the replicas."""

    def __init__(self, monkeypatch, *replicas):
        from sglang.srt.utils.aio_rwlock import RWLock
        from sglang.utils import TypeBasedDispatcher

        self.replicas, self.sent, self.before = replicas, [], lambda message: None
        self.is_pause_cond, self.model_update_lock = asyncio.Condition(), RWLock()
        self._result_dispatcher = TypeBasedDispatcher([])
        monkeypatch.setattr(verb, "get_parallel", lambda: SimpleNamespace(num_dp_ranks=len(replicas)))
        monkeypatch.setattr(verb, "replica", lambda: self.number)
        monkeypatch.setattr(verb, "current", lambda: replicas[self.number].runtime)

    def auto_create_handle_loop(self):
        pass

    def _dispatch_to_scheduler(self, message):
        self.sent.append(message.action)
        asyncio.get_running_loop().call_later(0.01, self._answer, message)

    def _answer(self, message):
        self.before(message)
        for number in reversed(range(len(self.replicas))):  # whoever is first
            self.number = number
            self._result_dispatcher(self._answer_of(number, message))

    def _answer_of(self, number, message):
        try:
            return verb.answer(self.replicas[number].scheduler, message)
        except RuntimeError as error:  # a scheduler that died would leave the front waiting
            return verb.KvEvictReqOutput(replica=number, error=f"died: {error}", answer={})

    def change(self, options):
        config = reconfigured(self.replicas[0].runtime.config, options)
        plain = config.model_dump(mode="json", exclude_unset=True)
        return verb._on_all(self, {"config": plain, "budgets": list(layers_of(config))})

    def configurations(self):
        return [replica.runtime.config for replica in self.replicas]


def test_all_replicas_take_it_and_it_is_in_effect_when_the_last_of_them_has_come_round(monkeypatch):
    front = Front(monkeypatch, Replica(), Replica().run())
    found = asyncio.run(front.change({"budget": {"tokens": 40}}))
    assert found == {"changed": {"budget.tokens": [30, 40]}, "effective": "next round"}
    assert [config.budget.tokens for config in front.configurations()] == [40, 40]
    assert front.sent == ["check", "reconfigure"]


def test_none_takes_what_one_refuses(monkeypatch):
    front = Front(monkeypatch, Replica(), Replica().run())
    before = front.configurations()
    with pytest.raises(ConfigError) as error:
        asyncio.run(front.change({"retain": {"sinks": 3}}))
    assert str(error.value).startswith("dp_rank 1: kv_evict: retain.sinks: changes on an idle server only, and 1 requ")
    assert "\n" not in str(error.value) and front.configurations() == before and front.sent == ["check"]
    front.replicas[0].run()
    with pytest.raises(ConfigError, match=r"dp_rank 0: .*; dp_rank 1: "):
        asyncio.run(front.change({"retain": {"sinks": 3}}))


def test_a_request_that_no_replica_has_yet_is_waited_for(monkeypatch):
    front = Front(monkeypatch, Replica(), Replica())

    async def meanwhile(options):
        async with front.model_update_lock.reader_lock:  # SGLang tokenizes it
            return await front.change(options)

    before = front.configurations()
    with pytest.raises(ConfigError, match=r"retain\.sinks: changes on an idle .* a request is on its way"):
        asyncio.run(meanwhile({"retain": {"sinks": 3}}))
    assert front.configurations() == before and front.sent == ["check"]
    assert asyncio.run(meanwhile({"rounds": {"interval": 4}}))["effective"] == "now"


def test_who_is_idle_stays_so_until_all_have_it(monkeypatch):
    """A request that comes in between would make one replica refuse what another has taken."""
    front, log = Front(monkeypatch, Replica(), Replica()), []
    front.before = lambda message: log.append(message.action)

    async def request():
        while not log:
            await asyncio.sleep(0)
        async with front.is_pause_cond:  # as SGLang's generate_request
            front.replicas[1].run()
            log.append("request")

    async def both():
        return (await asyncio.gather(front.change({"retain": {"sinks": 3}}), request()))[0]

    assert asyncio.run(both())["changed"] == {"retain.sinks": [2, 3]}
    assert log == ["check", "reconfigure", "request"]
    assert [config.retain.sinks for config in front.configurations()] == [3, 3]


def test_a_replica_that_breaks_its_word_ends(monkeypatch):
    front = Front(monkeypatch, Replica(), Replica())
    config = reconfigured(front.configurations()[0], {"retain": {"sinks": 3}})
    arguments = {"config": config.model_dump(mode="json", exclude_unset=True), "budgets": list(layers_of(config))}
    front.number = 1
    scheduler = front.replicas[1].run().scheduler
    refused = verb.answer(scheduler, verb.KvEvictReq(action="reconfigure", arguments={**arguments, "agreed": False}))
    assert refused.replica == 1 and "1 requests are running" in refused.error
    with pytest.raises(RuntimeError, match="a replica refused a change to which it had agreed: kv_evict: retain"):
        verb.answer(scheduler, verb.KvEvictReq(action="reconfigure", arguments={**arguments, "agreed": True}))


def test_each_replica_numbers_its_own_records(monkeypatch):
    front = Front(monkeypatch, Replica(), Replica())
    for replica, count in zip(front.replicas, (3, 1), strict=True):
        counters = replica.runtime.counters
        counters.finished.extend({"number": n + 1, "rid": f"{count}-{n}"} for n in range(count))
        counters.closed = count

    def told(*after):
        found = asyncio.run(verb.records(front, list(after)))
        return [(record["dp_rank"], record["number"]) for record in found["requests"]], found["newest"]

    assert told(0) == told(0, 0) == ([(0, 1), (0, 2), (0, 3), (1, 1)], [3, 1])
    assert told(2, 0) == ([(0, 3), (1, 1)], [3, 1]) and told(3, 1) == ([], [3, 1])
    for wrong in ([1], [0, 0, 0]):
        with pytest.raises(ConfigError, match=r"after: got \[.*expected 2 numbers of records, one for each dp_rank"):
            told(*wrong)
    alone = Front(monkeypatch, front.replicas[0])
    assert asyncio.run(verb.records(alone, [2])) == {"requests": [{"number": 3, "rid": "3-2"}], "newest": 3}
