"""What a reply says of its own eviction: the account, its way to the front, and the usage of OpenAI's routes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from sglang.srt.entrypoints.openai import protocol
from sglang.srt.entrypoints.openai.usage_processor import UsageProcessor
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from lethe_sglang.cache.layout import RowLayout
from lethe_sglang.cache.ledger import RequestState
from lethe_sglang.engine import lifecycle, replies
from lethe_sglang.engine.counters import lives
from lethe_sglang.engine.replies import KEY, LetheOutputStreamer, account, into_meta_info

TOLD = {"rounds": 3, "tokens_evicted": 41.5, "tokens_held": 60, "share": 48.0}
WORLD = SimpleNamespace(
    num_layers=2, page_size=4, config=SimpleNamespace(recent=15), evicts=lambda req: getattr(req, "mode", "on") == "on"
)


def request(*followed, ended=True, tokens=10, **more):
    req = SimpleNamespace(
        origin_input_ids=[0] * 7, output_ids=[0] * tokens, finished=lambda: ended, finished_output=False, **more
    )
    lives(req).extend(followed)
    return req


def life(rounds, evicted, kept, rest=0):
    layout = RowLayout(prefix=8, packed=8, tail=32)
    state = RequestState(rid="r", row=1, layout=layout, kept=kept, rest=rest, rounds=rounds, evicted=evicted)
    state.observe(50, 4)
    return state


# -- the account ------------------------------------------------------------------------------------------------------


def test_an_account_is_of_all_the_lives_of_a_request():
    first, second = life(2, [20, 10], (9, 9)), life(1, [5, 6], (40, 32), rest=3)
    expected = {"rounds": 3, "tokens_evicted": 20.5, "tokens_held": 36, "share": 48.0}
    assert account(WORLD, request(first, None, second)) == expected


def test_a_request_that_was_never_pruned_has_had_no_round_and_keeps_everything():
    intact = life(0, [0, 0], (0, 0))
    intact.layout = RowLayout(prefix=8, packed=0, tail=8)
    assert account(WORLD, request(intact)) == {"rounds": 0, "tokens_evicted": 0.0, "tokens_held": 52, "share": None}
    assert account(WORLD, request(tokens=1)) == {"rounds": 0, "tokens_evicted": 0.0, "tokens_held": 8, "share": None}


def test_a_request_that_ends_right_after_a_retraction_holds_all_of_itself():
    told = account(WORLD, request(life(2, [20, 10], (9, 9)), None, tokens=10))
    assert told == {"rounds": 2, "tokens_evicted": 15.0, "tokens_held": 20, "share": None}


def test_a_retraction_ends_a_life(monkeypatch):
    req = request(state := life(2, [20, 10], (9, 9)))
    counted = SimpleNamespace(retracted=0)
    monkeypatch.setattr(lifecycle, "current", lambda: SimpleNamespace(counters=counted, evicts=lambda req: True))
    lifecycle.after_retract(None, req)
    assert (lives(req), counted.retracted) == ([state, None], 1)


def test_only_requests_that_end_and_are_evicted_from_are_accounted_for(monkeypatch):
    monkeypatch.setattr(replies, "current", lambda: WORLD)
    streamer = LetheOutputStreamer.__new__(LetheOutputStreamer)
    done, going_on, none = request(), request(ended=False), request(mode="none")
    found = streamer.build_additional_customized_info([going_on, done, none])
    assert found == {KEY: [None, account(WORLD, done), None]}
    assert streamer.build_additional_customized_info([going_on, none]) == {}
    assert replies.streamer_class(object, None) is LetheOutputStreamer and streamer.has_additional_customized_info


# -- meta_info --------------------------------------------------------------------------------------------------------


def meta_info(info, index, stream=False):
    """What SGLang's own function makes of it."""
    manager = TokenizerManager.__new__(TokenizerManager)
    state = SimpleNamespace(
        obj=SimpleNamespace(stream=stream), customized_info_accumulated={}, customized_info_reported_keys=set()
    )
    found = {"completion_tokens": 12}
    into_meta_info(TokenizerManager.update_request_meta_info, manager, found, state, info, index, None)
    return found, state


def test_an_account_stands_in_meta_info_as_it_is_and_beside_what_others_add():
    info = {"entropy": [[0.5], [0.7, 0.1]], KEY: [None, TOLD]}
    found, state = meta_info(info, 1)
    assert found == {"completion_tokens": 12, "entropy": [0.7, 0.1], KEY: TOLD}
    assert type(found["completion_tokens"]) is int and KEY not in state.customized_info_accumulated
    assert meta_info(info, 0)[0] == {"completion_tokens": 12, "entropy": [0.5]}
    assert meta_info({"entropy": [[0.5]]}, 0)[0] == {"completion_tokens": 12, "entropy": [0.5]}
    assert list(info) == ["entropy", KEY], "the next request of the batch still finds its own"


def test_what_a_stream_is_told_is_still_a_number_for_whoever_reads_it():
    found, _ = meta_info({KEY: [TOLD]}, 0, stream=True)
    assert found["completion_tokens"] == 12 and found["completion_tokens"].account is TOLD
    assert json.loads(json.dumps(found)) == {"completion_tokens": 12, KEY: TOLD}


# -- usage ------------------------------------------------------------------------------------------------------------


def response(told):
    return {"meta_info": {"prompt_tokens": 5, "completion_tokens": 7, **({KEY: told} if told else {})}}


def usage_of(*told):
    responses = [response(one) for one in told]
    return replies.into_usage(UsageProcessor.calculate_response_usage(responses, len(told)), responses, len(told))


def streamed(*told):
    numbers = {}
    for index, one in reversed(list(enumerate(told))):  # choices end in any order
        numbers[index] = 7
        if one:
            numbers[index] = replies.Tokens(7)
            numbers[index].account = one
    of_stock = dict.fromkeys(numbers, 5), dict.fromkeys(numbers, 0), numbers
    usage = UsageProcessor.calculate_streaming_usage(*of_stock, cached_tokens={}, n_choices=len(told))
    return replies.into_streamed_usage(usage, *of_stock, cached_tokens={}, n_choices=len(told))


@pytest.fixture(scope="module", autouse=True)
def widened():
    replies.widen_usage()


def around(usage):
    """Every reply of OpenAI's routes that has a usage, as it goes over the wire."""
    common = {"id": "r", "model": "m", "choices": [], "usage": usage}
    chat, text = protocol.ChatCompletionResponse(**common), protocol.CompletionResponse(**common)
    chunk, piece = protocol.ChatCompletionStreamResponse(**common), protocol.CompletionStreamResponse(**common)
    written = [reply.model_dump_json() for reply in (chat, text, chunk)]
    return [json.loads(line)["usage"] for line in (*written, piece.model_dump_json(exclude_none=True))]


@pytest.mark.parametrize("made", [usage_of, streamed])
def test_usage_holds_the_account_of_a_reply_or_of_each_of_its_choices(made):
    other = {**TOLD, "share": None}
    for usage in around(made(TOLD)):
        assert (usage["kv_evict"], usage["completion_tokens"], usage["total_tokens"]) == (TOLD, 7, 12)
    for usage in around(made(TOLD, other)):
        assert (usage["kv_evict"], usage["completion_tokens"]) == ([TOLD, other], 14)


@pytest.mark.parametrize("made", [usage_of, streamed])
def test_usage_of_a_request_that_is_not_evicted_from_is_stocks(made):
    expected = UsageProcessor.calculate_response_usage([response(None)])
    assert made(None) == expected and [usage.get("kv_evict") for usage in around(made(None))] == [None] * 4
