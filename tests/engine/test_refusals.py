"""Bad input: one clear error naming the option and a legal value, before anything starts; never a silent fallback."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import pickle
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import MODEL, WARM

from lethe_sglang.config import from_mapping

pytest.importorskip("sglang")


@pytest.fixture(scope="module")
def sglang_front():
    """SGLang's argument parsing and resolution with plugins loaded, in this process."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    def resolve(*args):
        server_args = prepare_server_args(["--model-path", str(MODEL), *args])
        server_args.resolve_once()
        return server_args

    return resolve


def refused(sglang_front, capsys, *args) -> str:
    with pytest.raises(SystemExit) as stop:
        sglang_front(*args)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lethe: error:")]
    assert len(lines) == 1, lines
    return lines[0]


EVICT = ("--kv-evict", "lethe", "--kv-evict-config", "cpu-demo")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--kv-evict", "leth"), "did you mean 'lethe'"),
        (("--kv-evict", "lethe", "--kv-evict-config", "nowhere.yaml"), "nowhere.yaml"),
        (("--kv-evict", "lethe", "--kv-evict-config", "{not json"), "--kv-evict-config"),
        (("--kv-evict", "lethe", "--kv-evict-config", '{"budgte": {}}'), "did you mean budget"),
        (("--kv-evict", "lethe", "--kv-evict-budget", "5"), "budget.tokens"),
        (("--kv-evict-budget", "512"), "--kv-evict-budget needs --kv-evict"),
        (("--kv-evict", "none", "--kv-evict-config", "cpu-demo"), "--kv-evict-config needs --kv-evict"),
        (("--kv-evict", "lethe", "--kv-evict-config", '{"budget":{"allocation":"list","layers":[60,60]}}'), "4 layers"),
        ((*EVICT, "--attention-backend", "triton"), "triton on device cpu: set --attention-backend to torch_native -"),
        ((*EVICT, "--attention-backend", "flashinfer"), "flashinfer on device cpu: set --attention-backend to torch"),
        ((*EVICT, "--attention-backend", "flex_attention"), "flex_attention: set --attention-backend to torch_native"),
        ((*EVICT, "--enable-mixed-chunk"), "remove --enable-mixed-chunk"),
        ((*EVICT, "--pp-size", "2"), "--pp-size 1"),
        ((*EVICT, "--tp", "2", "--dp-size", "2", "--enable-dp-attention"), "remove --enable-dp-attention"),
        ((*EVICT, "--tp", "2", "--attn-dp-size", "2"), "set --attn-dp-size 1; --dp-size alone works"),
        ((*EVICT, "--elastic-ep-backend", "mooncake"), "remove --elastic-ep-backend"),
        ((*EVICT, "--enable-streaming-session"), "--enable-streaming-session"),
        ((*EVICT, "--tokenizer-worker-num", "2"), "--tokenizer-worker-num 1"),
        ((*EVICT, "--kv-canary", "log"), "--kv-canary none"),
        (
            (*EVICT, "--smg-grpc-mode"),
            "SMG's gRPC server (starts schedulers by a launcher of its own; --grpc-port",
        ),
        ((*EVICT, "--grpc-mode"), "remove --smg-grpc-mode"),
        ((*EVICT, "--use-ray"), "remove --use-ray"),
        ((*EVICT, "--radix-cache-backend", "x"), "--radix-cache-backend"),
        (
            (*EVICT, "--preferred-sampling-params", '{"custom_params": {"kv_evict": {"budget": 1}}}'),
            "--preferred-sampling-params: custom_params.kv_evict.budget: got 1, expected an integer from",
        ),
        (
            (*EVICT, "--preferred-sampling-params", '{"custom_params": [3]}'),
            "--preferred-sampling-params: custom_params: got [3]",
        ),
        (
            (*EVICT, "--preferred-sampling-params", '{"beam_width": 2}'),
            "--preferred-sampling-params: a server with --kv-evict does not take beam search",
        ),
    ],
)
def test_refused_with_the_option_to_change(sglang_front, capsys, args, named):
    assert named in refused(sglang_front, capsys, *args)


@pytest.mark.parametrize(
    ("sections", "tokens", "named"),
    [
        ({"budget": {"tokens": 900}}, 1000, r"budget.tokens: got 900.* up to 1030 tokens.* that fits .* is 870"),
        (
            {"budget": {"tokens": 24}, "rounds": {"interval": 999}},
            1000,
            r"rounds.interval: got 999.*--max-total-tokens",
        ),
    ],
)
def test_under_pressure_the_pool_must_hold_one_floor(sections, tokens, named):
    from lethe_sglang.engine import guard

    asked = {**sections, "rounds": {**sections.get("rounds", {}), "when": "pressure"}}
    with pytest.raises(guard.ConfigError, match=named):
        guard.check_pool(from_mapping(asked), 1, tokens)
    guard.check_pool(from_mapping(sections), 1, tokens)  # always: the request is longer than that or it is not
    guard.check_pool(from_mapping({**asked, "budget": {"tokens": 24}, "rounds": {"when": "pressure"}}), 1, tokens)


def test_a_launcher_refuses_a_floor_that_the_schedulers_pool_cannot_hold():
    asked = {"budget": {"tokens": 900}, "rounds": {"when": "pressure"}}
    ready, infos, killed = launched(asked)
    infos[0] |= {"lethe": ready.asked.request_id, "max_total_num_tokens": 1000}
    with pytest.raises(ValueError, match=r"budget\.tokens: got 900"):
        ready.wait_for_ready()
    assert killed
    infos[0]["max_total_num_tokens"] = 4000
    ready.wait_for_ready()


def launched(asked, replicas=1):
    """What a launcher waits for: its result, what has been reported so far, and who was killed."""
    from lethe_sglang.engine import entrypoints, proof

    request, killed = entrypoints.EvictionRequest(config=from_mapping(asked), from_cli=False), []
    ready = SimpleNamespace(wait_for_ready=lambda: None, scheduler_infos=[{}], asked=request)
    proof.check_ranks(request, replicas, 1, ready, [SimpleNamespace(kill=lambda: killed.append(True))])
    return ready, ready.scheduler_infos, killed


def reported(request, *ranks):
    """What SGLang's controller reports when its ranks have, each with an id and the size of its pool."""
    from sglang.srt.managers.data_parallel_controller import DataParallelController

    from lethe_sglang.engine import proof

    infos = [{"lethe": name, "max_total_num_tokens": size, "max_req_input_len": 9} for name, size in ranks]
    controller = SimpleNamespace(
        server_args=SimpleNamespace(_lethe=request),
        _scheduler_init_info_lock=contextlib.nullcontext(),
        _scheduler_init_infos=infos,
        max_total_num_tokens=infos[0]["max_total_num_tokens"],
        max_req_input_len=9,
        startup_time=None,
    )
    stock = inspect.unwrap(DataParallelController.get_init_info)(controller)
    assert "lethe" not in stock and proof.relay(stock, SimpleNamespace(server_args=None)) is stock
    return proof.relay(stock, controller)


def test_each_replica_has_to_say_that_it_evicts_and_to_hold_a_floor():
    """SGLang's controller drops what it does not know of its ranks' reports; the hook passes it on."""
    asked = {"budget": {"tokens": 900}, "rounds": {"when": "pressure"}}
    ready, infos, killed = launched(asked, replicas=2)
    right = ready.asked.request_id
    for ranks, named in (
        (((right, 4000), (None, 4000)), r"without eviction \(ranks reported \['.*', None\], expected"),
        (((right, 4000), ("another", 4000)), "without eviction"),
        (((right, 4000),), "of each of 2"),
        (((right, 4000), (right, 1000)), r"budget\.tokens: got 900"),
    ):
        infos[0] = reported(ready.asked, *ranks)
        with pytest.raises((RuntimeError, ValueError), match=named):
            ready.wait_for_ready()
        assert killed.pop()
    infos[0] = {"status": "ready", "max_total_num_tokens": 4000}  # the hook did not run
    with pytest.raises(RuntimeError, match="without eviction"):
        ready.wait_for_ready()
    infos[0] = reported(ready.asked, (right, 4000), (right, 5000))
    ready.wait_for_ready()
    assert infos[0]["lethe"] == right and "lethe_ranks" not in infos[0]


def test_a_name_that_another_distribution_claims_is_refused_with_who_does(sglang_front, capsys, monkeypatch):
    from importlib.metadata import EntryPoint

    from lethe_sglang.policies import registry

    claims = [EntryPoint("lethe", "theirs:Policy", registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: claims)
    for known in (registry._registered, registry.policy_class):
        known.cache_clear()
    try:
        assert "the name is taken by lethe-sglang" in refused(sglang_front, capsys, *EVICT)
    finally:
        monkeypatch.undo()
        for known in (registry._registered, registry.policy_class):
            known.cache_clear()


def graphs(**backends):
    return SimpleNamespace(**{phase: SimpleNamespace(backend=backend) for phase, backend in backends.items()})


def options(**values):
    """What the guard reads of a server on CUDA that is stock but for ``values``."""
    stock = {
        "device": "cuda",
        "attention_backend": "flashinfer",
        "prefill_attention_backend": None,
        "decode_attention_backend": None,
        "disable_overlap_schedule": True,
        "dp_size": 1,
        "cuda_graph_config": graphs(prefill="breakable", decode="full"),
    }
    return SimpleNamespace(**{**stock, **values})


@pytest.mark.proves("any other attention backend", "different backends for prefill and decode")
def test_on_cuda_three_backends_serve_and_prefill_and_decode_share_one(monkeypatch):
    from lethe_sglang.engine import guard

    monkeypatch.setattr(guard, "REFUSALS", ())
    for name in ("torch_native", "flashinfer", "triton"):
        guard.check_options(options(attention_backend=name))
    guard.check_options(
        options(attention_backend="fa3", prefill_attention_backend="triton", decode_attention_backend="triton")
    )
    with pytest.raises(
        guard.ConfigError, match="backend fa4: set --attention-backend to torch_native or flashinfer or"
    ):
        guard.check_options(options(attention_backend="fa4"))
    with pytest.raises(
        guard.ConfigError, match=r"prefill \(triton\) and decode \(flashinfer\): set --attention-backend"
    ):
        guard.check_options(options(prefill_attention_backend="triton"))


@pytest.mark.parametrize("device", ["xpu", "npu", "cuda:1", "cpu", None])
def test_a_device_without_kernels_is_refused(monkeypatch, device):
    from lethe_sglang.engine import guard

    (refusal,) = (r for r in guard.REFUSALS if r.feature.startswith("devices other"))
    monkeypatch.setattr(guard, "REFUSALS", (refusal,))
    resolved = options(device=device, attention_backend="torch_native")
    if device in ("xpu", "npu"):
        with pytest.raises(guard.ConfigError, match="set --device to cuda or cpu"):
            guard.check_options(resolved)
    else:
        guard.check_options(resolved)


@contextmanager
def gpu(**facts):
    """A machine of this compute capability, and what SGLang asks of it besides."""
    from sglang.srt.arg_groups import model_override_base
    from sglang.srt.runtime_context import override_platform

    nothing = dict.fromkeys(("is_hopper_with_cuda_12_3", "is_sm100", "is_sm120", "has_flashinfer"), False)
    with override_platform(**(nothing | facts)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_override_base, "current_platform", SimpleNamespace(is_out_of_tree=lambda: False))
        yield


HOPPER = {"device_capability": (9, 0), "is_hopper_with_cuda_12_3": True, "has_flashinfer": True}
AMPERE = {"device_capability": (8, 0), "has_flashinfer": True}
BLACKWELL = {"device_capability": (10, 0), "is_sm100": True, "has_flashinfer": True}


@pytest.mark.parametrize(
    ("server", "uniform", "facts", "named"),
    [
        ({}, True, HOPPER, None),
        ({}, True, AMPERE, None),
        ({"prefill_attention_backend": "fa3", "decode_attention_backend": "fa3"}, True, HOPPER, None),
        (
            {},
            False,
            HOPPER,
            "backend fa3 with budgets that differ by layer, which one page table cannot hold: set "
            "--attention-backend to torch_native or flashinfer or triton, or budget.allocation to uniform - or use",
        ),
        ({}, True, BLACKWELL, "on this GPU, which is not of compute capability 8 or 9: set --attention-backend to tor"),
        ({"kv_cache_dtype": "fp8_e5m2"}, True, HOPPER, "fa3 with --kv-cache-dtype fp8_e5m2: set --attention-backend"),
        ({"device": "cpu"}, True, HOPPER, "fa3 on device cpu: set --attention-backend to torch_native - or use"),
        (
            {"prefill_attention_backend": "flashinfer"},
            True,
            HOPPER,
            "prefill (flashinfer) and decode (fa3): set --attention-backend alone",
        ),
    ],
)
@pytest.mark.proves("attention backend fa3, CUDA graphs")
def test_fa3_serves_uniform_budgets_where_it_runs(sglang_front, monkeypatch, server, uniform, facts, named):
    from lethe_sglang.engine import guard

    monkeypatch.setattr(guard, "REFUSALS", ())
    resolved = options(**{"attention_backend": "fa3", "kv_cache_dtype": "auto", **server})
    with gpu(**facts):
        if named is None:
            guard.check_options(resolved, uniform)
            return
        with pytest.raises(guard.ConfigError, match=re.escape(named)):
            guard.check_options(resolved, uniform)


@pytest.mark.parametrize(
    ("budget", "uniform"),
    [
        ({"tokens": 64}, True),
        ({"allocation": "list", "layers": [64, 64]}, True),
        ({"allocation": "list", "layers": [64, 65]}, False),
        ({"allocation": "profile"}, False),
        ({"allocation": "breakpoint", "profile": "none"}, False),
    ],
)
def test_a_server_of_unequal_budgets_is_refused_fa3(sglang_front, capsys, monkeypatch, budget, uniform):
    """As a whole: options of a configuration, SGLang's resolution, one line."""
    from lethe_sglang.engine import guard

    monkeypatch.setattr(guard, "on_cuda", lambda resolved: True)
    layers = budget.get("layers", [])
    if layers:
        budget = {**budget, "layers": layers * 2}
    args = ("--kv-evict", "lethe", "--kv-evict-config", json.dumps({"budget": budget}), "--attention-backend", "fa3")
    with gpu(**HOPPER):
        if uniform:
            sglang_front(*args)
        else:
            assert "fa3 with budgets that differ by layer" in refused(sglang_front, capsys, *args)


@pytest.mark.parametrize(
    ("measures", "debug", "server", "named"),
    [
        (True, {}, {"attention_backend": "torch_native", "disable_overlap_schedule": False}, "overlap"),
        (True, {}, {"attention_backend": "torch_native", "dp_size": 2}, "lethe profile: measures on one replica; set"),
        (True, {}, {}, "lethe profile: needs --attention-backend torch_native, the server uses flashinfer"),
        (False, {"shadow": True}, {"attention_backend": "triton"}, "no step that a CUDA graph .*--disable-cuda-graph"),
        (False, {"shadow": True}, {"cuda_graph_config": graphs(prefill="breakable", decode="disabled")}, "shadow: com"),
    ],
)
def test_checks_that_a_backend_cannot_do_are_refused(measures, debug, server, named):
    from lethe_sglang.config import from_mapping
    from lethe_sglang.engine import guard

    config = from_mapping({"debug": debug}).debug
    with pytest.raises(guard.ConfigError, match=named):
        guard.check_debug(options(**server), config, measures)
    eager = graphs(prefill="disabled", decode="disabled")
    guard.check_debug(options(attention_backend="torch_native", cuda_graph_config=eager), config, measures)
    if not measures:
        guard.check_debug(options(cuda_graph_config=eager), config, measures)
        guard.check_debug(options(device="cpu"), config, measures)
    guard.check_debug(options(), from_mapping({}).debug, measures=False)


def test_a_server_knows_whether_its_decode_steps_are_captured():
    from lethe_sglang.engine import graphs as graph_rules

    assert graph_rules.captures(options())
    assert not graph_rules.captures(options(cuda_graph_config=graphs(prefill="full", decode="disabled")))
    assert not graph_rules.captures(options(cuda_graph_config=None))


@pytest.mark.parametrize(
    ("device", "named", "evicts", "chosen"),
    [
        ("cuda", {}, True, "flashinfer"),
        ("cuda", {}, False, None),
        ("cpu", {}, True, None),
        ("cuda", {"attention_backend": "triton"}, True, "triton"),
        ("cuda", {"decode_attention_backend": "torch_native"}, True, None),
    ],
)
@pytest.mark.proves("no attention backend named")
def test_flashinfer_is_picked_on_cuda_where_no_backend_is_named(sglang_front, caplog, device, named, evicts, chosen):
    from lethe_sglang.engine import entrypoints as front

    budget = {"allocation": "list", "layers": [64, 64, 64, 65]}
    config = front.EvictionConfig.model_validate({"budget": budget}) if evicts else None
    seen = picked(front.choose_backend, config, device=device, facts=HOPPER, caplog=caplog, **named)
    assert seen == chosen, "SGLang resolves the rest after the pick"
    assert ("using flashinfer" in caplog.text) == (chosen == "flashinfer")


def picked(choose, config, facts, caplog, device="cuda", **named):
    """The backend that SGLang's own step finds, after the plugin has chosen."""
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.server_args import ServerArgs

    from lethe_sglang.engine import entrypoints as front

    server_args = ServerArgs(model_path=str(MODEL), device=device, **named)
    if config is not None:
        server_args._lethe = front.EvictionRequest(config, from_cli=False)
    seen = []
    with gpu(**facts), caplog.at_level("INFO", logger="lethe_sglang"):
        choose(server_args, lambda args: seen.append(resolving_view(args).attention_backend))
    return seen[0]


UNIFORM, BY_LAYER = {"tokens": 64}, {"allocation": "list", "layers": [64, 64, 64, 65]}
DIFFERS = "SGLang's own choice, fa3, does not serve with budgets that differ by layer"


@pytest.mark.parametrize(
    ("facts", "budget", "deterministic", "chosen", "why"),
    [
        (HOPPER, UNIFORM, False, "fa3", "as SGLang would"),
        (HOPPER, BY_LAYER, False, "flashinfer", f"because {DIFFERS}"),
        (AMPERE, UNIFORM, False, "flashinfer", "as SGLang would"),
        (AMPERE | {"has_flashinfer": False}, BY_LAYER, False, "triton", "as SGLang would"),
        (BLACKWELL, UNIFORM, False, "flashinfer", "because SGLang's own choice, trtllm_mha, does not serve\n"),
        (HOPPER, UNIFORM, True, "fa3", "as SGLang would"),
        (HOPPER, BY_LAYER, True, "triton", f"because {DIFFERS}"),
        (AMPERE, UNIFORM, True, "fa3", "as SGLang would"),
        (BLACKWELL, UNIFORM, True, "flashinfer", "as SGLang would"),
        ({"device_capability": (7, 5)}, UNIFORM, True, "triton", "does not serve on this GPU"),
    ],
)
@pytest.mark.proves("no attention backend named")
def test_sglangs_own_choice_is_taken_where_it_serves(sglang_front, caplog, facts, budget, deterministic, chosen, why):
    from lethe_sglang.engine import entrypoints as front

    config = front.EvictionConfig.model_validate({"budget": budget})
    choose = front.choose_deterministic_backend if deterministic else front.choose_backend
    named = {"enable_deterministic_inference": True} if deterministic else {}
    assert picked(choose, config, facts, caplog, **named) == chosen
    lines = [record.getMessage() for record in caplog.records if record.name == "lethe_sglang"]
    assert len(lines) == 1 and f"backend not specified; using {chosen}, " in lines[0] and why in lines[0] + "\n"


@pytest.mark.parametrize(
    ("gib", "named", "evicts", "largest", "sizes"),
    [
        (80, {}, True, 512, 44),
        (80, {}, False, 256, 36),
        (80, {"max_running_requests": 300}, True, 300, 38),
        (80, {"max_running_requests": 200}, True, 200, 29),
        (80, {"cuda_graph_max_bs_decode": 200}, True, 200, 29),
        (80, {"cuda_graph_bs_decode": [64]}, True, 64, 1),
        (80, {"cuda_graph_config": {"decode": {"max_bs": 128}}}, True, 128, 20),
        (80, {"tp_size": 4}, True, 512, 52),
        (80, {"disable_decode_cuda_graph": True}, True, 256, 36),
        (80, {"disable_cuda_graph_padding": True}, True, 256, 256),
        (80, {"device": "cpu"}, True, 32, 24),
        (40, {}, True, 128, 14),
        (24, {"mem_fraction_static": 0.8}, True, 192, 19),
    ],
)
def test_decode_graphs_reach_the_batches_that_eviction_admits(
    sglang_front, monkeypatch, caplog, gib, named, evicts, largest, sizes
):
    from sglang.srt.arg_groups import cuda_graph_hook, memory_hook, resolution_hooks
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.server_args import ServerArgs

    from lethe_sglang.engine import entrypoints as front

    monkeypatch.setattr(memory_hook, "get_device_memory_capacity", lambda device: gib * 1024)
    server_args = ServerArgs(**{"model_path": str(MODEL), "device": "cuda", **named})
    if evicts:
        server_args._lethe = front.EvictionRequest(front.EvictionConfig(), from_cli=False)
    cuda_graph_hook.parse_cuda_graph_config(server_args)
    with caplog.at_level("INFO", logger="lethe_sglang"):
        resolution_hooks.run_hook(memory_hook.handle_gpu_memory_settings, server_args)
    view = resolving_view(server_args)
    decode = view.cuda_graph_config.decode
    assert (decode.max_bs, len(decode.bs)) == (largest, sizes)
    if decode.backend != "disabled" and view.device == "cuda":
        assert decode.bs == sorted(set(decode.bs)) and decode.bs[-1] == largest
    assert ("decode graphs of up to" in caplog.text) == (
        evicts and not set(named) - {"max_running_requests", "mem_fraction_static"} and largest != 200
    )
    if "mem_fraction_static" in named:
        assert view.mem_fraction_static == 0.8, "what is named stays"
    elif gib == 80 and not named:
        assert view.mem_fraction_static == (0.830 if evicts else 0.836), "SGLang reserves 2 MB a request"


@pytest.mark.parametrize("asked", [{"enable_deterministic_inference": True}, {"rl_on_policy_target": "fsdp"}, {}])
def test_deterministic_inference_takes_triton_before_sglang_picks_a_backend_of_its_own(sglang_front, asked):
    """SGLang's deterministic step comes before the one that picks backends, and on Hopper it takes fa3."""
    from sglang.srt.arg_groups import resolution_hooks
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.server_args import ServerArgs

    from lethe_sglang.engine import entrypoints as front

    names = ("handle_deterministic_inference", "handle_attention_backend_compatibility")
    source = Path(resolution_hooks.__file__).read_text()
    assert source.index(names[0]) < source.index(names[1])
    server_args = ServerArgs(model_path=str(MODEL), device="cuda", **asked)
    config = front.EvictionConfig.model_validate({"budget": BY_LAYER})
    server_args._lethe = front.EvictionRequest(config, from_cli=False)
    seen = []
    with gpu(**HOPPER):
        for choose in (front.choose_deterministic_backend, front.choose_backend):
            choose(server_args, lambda args: seen.append(resolving_view(args).attention_backend))
    assert seen == (["triton", "triton"] if asked else [None, "flashinfer"])


def test_what_sglang_would_choose_is_what_it_chooses(sglang_front, caplog):
    """The plugin says before SGLang's steps what these will choose: run them, and see."""
    from sglang.srt.arg_groups import attention_hook, overrides
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.server_args import ServerArgs

    from lethe_sglang.engine import entrypoints as front

    rules = {
        False: (overrides._attention_backend_default, overrides._attention_backend_fa3_fp8_fallback),
        True: (overrides._deterministic_attention_backend,),
    }
    machines = (HOPPER, AMPERE, BLACKWELL, {"device_capability": (12, 0), "is_sm120": True, "has_flashinfer": True})
    for facts, dtype in ((facts, dtype) for facts in machines for dtype in ("auto", "fp8_e5m2")):
        for deterministic in (False, True):
            asked = {"kv_cache_dtype": dtype, "enable_deterministic_inference": deterministic}
            stock = ServerArgs(model_path=str(MODEL), device="cuda", **asked)
            with gpu(**facts):
                for rule in rules[deterministic]:
                    attention_hook.run_post_process_pass(stock, rule)
                chosen = resolving_view(stock).attention_backend
            choose = front.choose_deterministic_backend if deterministic else front.choose_backend
            caplog.clear()
            mine = picked(choose, front.EvictionConfig(), facts, caplog, **asked)
            assert mine == chosen or f"SGLang's own choice, {chosen}," in caplog.text


class Stock:
    """All refused fields at the value of a stock server."""

    disaggregation_mode, kv_cache_dtype, kv_canary = "null", "auto", "none"
    dp_size = attn_dp_size = pp_size = dcp_size = attn_cp_size = tokenizer_worker_num = 1
    device, attention_backend = "cpu", "torch_native"

    def __getattr__(self, name):
        return None


@pytest.mark.parametrize(
    "name",
    [
        "SGLANG_RUST_SERVER",
        "SGLANG_USE_HND_KVCACHE",
        "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
        "SGLANG_ENABLE_METADATA_GLUE_GRAPH",
    ],
)
def test_a_variable_of_the_environment_that_cannot_work_is_refused(sglang_front, monkeypatch, name):
    from lethe_sglang.engine import guard

    for value in ("1", "True", "on"):
        monkeypatch.setenv(name, value)
        with pytest.raises(guard.ConfigError, match=rf"does not work with {name} \(.*\): unset it - or use"):
            guard.check_options(Stock())
    monkeypatch.setenv(name, "0")
    guard.check_options(Stock())


def test_every_refusal_of_the_table_fires_and_reaches_the_support_matrix(sglang_front):
    from lethe_sglang.engine import guard
    from lethe_sglang.engine.support import support_matrix

    guard.check_options(Stock())
    probes = {
        "speculative decoding": {"speculative_algorithm": "EAGLE"},
        "LMCache": {"enable_lmcache": True},
        "prefill/decode disaggregation": {"disaggregation_mode": "decode"},
        "PD multiplexing": {"enable_pdmux": True},
        "hierarchical cache": {"enable_hierarchical_cache": True},
        "FlexKV": {"enable_flexkv": True},
        "external cache linker": {"enable_unified_cache_external_linker": True},
        "custom radix cache backend": {"radix_cache_backend": "x"},
        "data-parallel attention": {"attn_dp_size": 2},
        "elastic expert parallelism": {"elastic_ep_backend": "mooncake"},
        "pipeline parallelism": {"pp_size": 2},
        "decode context parallelism": {"dcp_size": 2},
        "KV cache sharding": {"enable_kv_cache_sharding": True},
        "mixed chunk": {"enable_mixed_chunk": True},
        "two-batch overlap": {"enable_two_batch_overlap": True},
        "diffusion LLM": {"dllm_algorithm": "x"},
        "streaming sessions": {"enable_streaming_session": True},
        "fp4 and mxfp8 KV cache": {"kv_cache_dtype": "mxfp8"},
        "fp8 KV cache without a GPU": {"kv_cache_dtype": "fp8_e4m3"},
        "page-major KV layout": {"enable_page_major_kv_layout": True},
        "unified memory pool": {"enable_unified_memory": True},
        "HiSparse": {"enable_hisparse": True},
        "routed-expert capture": {"enable_return_routed_experts": True},
        "KV canary": {"kv_canary": "log"},
        "several tokenizer workers": {"tokenizer_worker_num": 2},
        "full CUDA graphs of prefill": {"cuda_graph_config": graphs(prefill="full")},
        "embedding-only or prefill-only KV": {"prefill_only_disable_kv_cache": True},
        "SMG's gRPC server": {"smg_grpc_mode": True},
        "Ray": {"use_ray": True},
        "torch.compile": {"enable_torch_compile": True},
        "encoder-only servers": {"encoder_only": True},
        "devices other than a CPU and NVIDIA GPUs": {"device": "xpu"},
    }
    matrix = support_matrix()
    for refusal in guard.REFUSALS:
        server = Stock()
        server.__dict__.update(probes[refusal.feature])
        with pytest.raises(guard.ConfigError, match=r"--kv-evict does not work with") as error:
            guard.check_options(server)
        assert refusal.instead in str(error.value)
        assert refusal.feature in matrix


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "MLA"),
        ({"attn_logit_softcapping": 50.0}, "caps on attention logits"),
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}, "sliding"),
    ],
)
def test_unsupported_models_are_refused(changes, named):
    from lethe_sglang.engine import guard

    kind = SimpleNamespace(name="MLA" if named == "MLA" else "MHA")
    model = SimpleNamespace(
        attention_arch=kind,
        is_hybrid_swa=named == "sliding",
        sliding_window_size=None,
        is_encoder_decoder=False,
        is_generation=True,
        head_dim=64,
        v_head_dim=64,
        hf_config=SimpleNamespace(**changes),
    )
    original, guard._is_hybrid_linear = guard._is_hybrid_linear, lambda m: False
    try:
        with pytest.raises(guard.ConfigError, match=named):
            guard.check_model(model)
    finally:
        guard._is_hybrid_linear = original


def test_another_sglang_version_is_refused(sglang_front, capsys, monkeypatch):
    from lethe_sglang.engine import compat

    monkeypatch.setattr(compat.importlib.metadata, "version", lambda name: "0.5.99")
    line = refused(sglang_front, capsys, *EVICT)
    assert "0.5.99" in line and "pip install sglang==0.5.23" in line


def test_a_modified_sglang_function_is_refused(sglang_front, capsys, monkeypatch):
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    def check_decode_mem(self, selected_indices=None):
        return True

    monkeypatch.setattr(ScheduleBatch, "check_decode_mem", check_decode_mem)
    assert "ScheduleBatch.check_decode_mem" in refused(sglang_front, capsys, *EVICT)


def test_what_another_sglang_changed_is_listed(sglang_front, capsys, monkeypatch):
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    from lethe_sglang.engine import compat

    monkeypatch.setattr(compat.sys, "argv", ["compat", "--against-installed"])
    assert compat.main() == 0
    assert capsys.readouterr().out == "sglang 0.5.23: 0 of the targets recorded from 0.5.23 changed\n"

    monkeypatch.setattr(ScheduleBatch, "check_decode_mem", lambda self, selected_indices=None: True)
    monkeypatch.delattr(ScheduleBatch, "prepare_for_decode")
    assert compat.main() == 1
    first, *targets = capsys.readouterr().out.splitlines()
    assert first == "sglang 0.5.23: 2 of the targets recorded from 0.5.23 changed"
    assert {target.rpartition(".")[2] for target in targets} == {"check_decode_mem", "prepare_for_decode"}


def test_none_installs_no_runtime_hook(sglang_front):
    from sglang.srt.managers.scheduler import Scheduler

    from lethe_sglang.engine import entrypoints as front
    from lethe_sglang.engine import hooking, hooks

    server_args = sglang_front("--kv-evict", "none")
    front.start_scheduler(object(), server_args)
    scheduler_targets = {hook.target for hook in hooks.SCHEDULER_HOOKS}
    assert not scheduler_targets & hooking._installed
    assert not hasattr(Scheduler.update_running_batch, "__wrapped__")


def test_engine_raises_a_config_error(sglang_front):
    import sglang as sgl

    from lethe_sglang.config import ConfigError

    with pytest.raises(ConfigError, match="did you mean 'lethe'"):
        sgl.Engine(model_path=str(MODEL), kv_evict="lethee")


def test_a_copy_of_server_arguments_keeps_what_was_asked_for(sglang_front):
    from sglang.srt.server_args import ServerArgs

    asked = sglang_front(*EVICT)
    for copied in (
        copy.copy(asked),
        copy.deepcopy(asked),
        pickle.loads(pickle.dumps(asked)),
        asked.__replace__(port=31000),  # copy.replace
    ):
        assert copied._lethe == asked._lethe and copied._lethe.config.budget.tokens == 48
    assert not hasattr(copy.copy(ServerArgs(model_path=str(MODEL))), "_lethe")


def test_what_is_built_of_keywords_takes_ours(sglang_front, monkeypatch):
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

    from lethe_sglang.engine import keywords

    adapter = ModuleType("http_server_engine")  # as SGLang's, which imports the class by its name
    adapter.ServerArgs = ServerArgs
    monkeypatch.setitem(sys.modules, "sglang.srt.entrypoints.http_server_engine", adapter)
    monkeypatch.setattr(Engine, "server_args_class", ServerArgs)
    keywords.take_keywords()
    for build in (Engine.server_args_class, adapter.ServerArgs):
        asked = build(model_path=str(MODEL), kv_evict="lethe", kv_evict_config={"rounds": {"interval": 9}})
        assert asked._lethe.config.rounds.interval == 9 and not asked._lethe.from_cli
        assert not hasattr(build(model_path=str(MODEL)), "_lethe")
    with pytest.raises(TypeError, match="kv_evict"):
        ServerArgs(model_path=str(MODEL), kv_evict="lethe")


def test_whoever_launches_settles_what_is_asked_for_though_no_flag_was_read_here(sglang_front, monkeypatch):
    """A process that was handed pickled arguments, as SGLang's HttpServerEngineAdapter and Runtime start one."""
    from sglang.srt.entrypoints.engine import Engine

    from lethe_sglang.engine import entrypoints as front
    from lethe_sglang.engine import hooking, proof, verb

    asked, given = sglang_front(*EVICT), []
    monkeypatch.setattr(verb, "open_doors", lambda engine: None)
    monkeypatch.setattr(proof, "check_ranks", lambda *args: None)
    front.launch(lambda cls, args: given.append(args) or ([], []), Engine, asked)
    assert given[0]._lethe.budgets == (33,) * 4
    targets = {"_init_req_state", "_validate_one_request"}
    assert targets <= {target.rpartition(".")[2] for target in hooking._installed}
    assert hasattr(Engine._launch_scheduler_processes, "__wrapped__")


def test_every_route_of_sglangs_server_has_been_looked_at(sglang_front):
    from routes import NO_DECODING, ROUTES
    from sglang.srt.entrypoints.http_server import app

    posts = [route for route in app.routes if "POST" in (getattr(route, "methods", None) or ())]
    open_to_all = {route.path for route in posts if not hasattr(route.endpoint, "_auth_level")}
    assert open_to_all == {*ROUTES, *NO_DECODING}, "docs/guide.md lists the routes that take an override"


def test_a_program_of_sglang_that_loads_no_plugins_is_run_with_them(tmp_path):
    (tmp_path / "program.py").write_text(
        "import argparse, sys\n"
        "from sglang.srt.server_args import ServerArgs\n"
        "parser = argparse.ArgumentParser()\n"
        "ServerArgs.add_cli_args(parser)\n"
        "print(ServerArgs.from_cli_args(parser.parse_args())._lethe.config.policy, __name__)\n"
    )
    out = WARM.run(
        ["-m", "lethe_sglang.plugin", "program", "--model-path", MODEL, *EVICT],
        folder=tmp_path,
        PYTHONPATH=str(tmp_path),
    )
    assert out.stdout.splitlines()[-1:] == ["lethe __main__"], out.stdout + out.stderr
    out = WARM.run(["-m", "lethe_sglang.plugin"])
    assert out.returncode == 1 and "lethe_sglang.plugin: give the module to run, for example" in out.stderr


def test_without_the_plugin_the_flag_is_an_error():
    program = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.server_args import prepare_server_args\n"
        f"prepare_server_args(['--model-path', '{MODEL}', '--kv-evict', 'lethe'])"
    )
    out = WARM.run(["-c", program], SGLANG_PLUGINS="somebody_else")
    assert out.returncode == 2 and "unrecognized arguments: --kv-evict" in out.stderr


BROKEN = """
import os, sys
if __name__ == "__mp_main__":  # a spawned child, before it unpickles its arguments
    sys.path[:0] = {child_path!r}
if __name__ == "__main__":
    from sglang.srt.plugins import load_plugins
    load_plugins()
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.entrypoints.engine import Engine
    server_args = prepare_server_args({args!r})
    {sabotage}
    try:
        Engine(server_args=server_args)
    except BaseException as error:
        print("refused:", type(error).__name__, error, flush=True)
        os._exit(7)
    print("serving without eviction", flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("case", ["not loaded in the scheduler", "import error in the scheduler"])
def test_a_plugin_broken_in_the_scheduler_process_cannot_lead_to_a_silent_server(tmp_path, case):
    broken = tmp_path / "broken"
    (broken / "lethe_sglang").mkdir(parents=True)
    (broken / "lethe_sglang" / "__init__.py").write_text("raise ImportError('broken plugin')")
    args = ["--model-path", str(MODEL), "--max-total-tokens", "1024", *EVICT]
    if case.startswith("import"):
        child_path, sabotage, named = [str(broken)], "pass", "ImportError: broken plugin"
    else:
        child_path, named = [], "a scheduler started without eviction"
        sabotage = 'os.environ["SGLANG_PLUGINS"] = "lethe_cpu"'
    script = tmp_path / "launch.py"
    script.write_text(BROKEN.format(args=args, sabotage=sabotage, child_path=child_path))
    out = WARM.run([script], folder=tmp_path)
    assert "serving without eviction" not in out.stdout
    assert out.returncode != 0
    assert named in out.stdout + out.stderr, out.stdout[-1500:] + out.stderr[-1500:]


def test_show_support_prints_the_matrix():
    out = subprocess.run(
        [sys.executable, "-m", "lethe_sglang.cli.main", "show", "--support"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0 and "| radix prefix cache | yes |" in out.stdout
    assert "| speculative decoding | refused |" in out.stdout
