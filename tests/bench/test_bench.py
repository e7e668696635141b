import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lethe_bench.cli import bench as cli
from lethe_bench.machine import CpuMeter, machine
from lethe_bench.servers import (
    Server,
    ServerError,
    port_free,
    run_client,
)
from lethe_bench.throughput.measure import Held, Measurement, _check_complete, evicted, parse_log
from lethe_bench.throughput.plan import ARMS, Plan, never_due
from lethe_bench.throughput.report import (
    ABSOLUTES,
    COUNTS,
    PAIRS,
    RATIOS,
    About,
    Spread,
    medians,
    ratios,
    to_json,
    to_markdown,
)
from lethe_sglang.cli import main as program
from lethe_sglang.config import ConfigError, resolve
from lethe_sglang.processes import ending_on_signals

MODEL = str(Path(__file__).parents[2] / "models" / "reasoner-dev")
CONFIG = resolve("lethe", '{"rounds": {"interval": 16}}', 48)
PLAN = Plan(model_path=MODEL, config=CONFIG)
ABOUT = About("lethe bench", {"cpu": "Some CPU", "cores": 2, "memory_gib": 23.0, "gpus": []}, {"sglang": "0.5.23"})

LOG = """\
[2026-01-01 10:00:00] Prefill batch, #new-seq: 3, #new-token: 192, #cached-token: 0, token usage: 0.00,
[2026-01-01 10:00:01] Decode batch, #running-req: 3, #token: 100, token usage: 0.02, cpu graph: False, #queue-req: 0
[2026-01-01 10:00:02] Decode batch, #running-req: 2, #token: 300, token usage: 0.07, lethe rounds: 3, saved #token: 9
[2026-01-01 10:00:03] KV cache pool is full. Retract requests. #retracted_reqs: 2, #new_tokens_gained: 128, \
#new_token_ratio: 0.5 -> 0.9
[2026-01-01 10:00:04 TP0] Decode batch [17], #running-req: 1, #full token: 50, full token usage: 0.02, #swa token: 7
"""


def measurement(arm, repeat, throughput=10.0, running=3.0, device="cpu", others=0.01):
    times = {
        "output_throughput": throughput,
        "median_tpot_ms": 50.0,
        "p99_tpot_ms": 60.0,
        "median_ttft_ms": 100.0,
        "p99_ttft_ms": 0.0,
        "duration": 20.0,
    }
    lethe = None if arm == "stock" else {"rounds": 7, "round_seconds": 1.0, "tokens_evicted_per_layer": [100, 300]}
    return Measurement(
        arm=arm,
        repeat=repeat,
        times=times,
        held=Held(100, running, 4, 300.0, 400, 1, 2),
        lethe=lethe,
        server={"device": device, "page_size": 1},
        ready_seconds=40.0,
        others_cpu=others,
    )


def parsed(*options):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    cli.add_parser(parser.add_subparsers(dest="command"))
    return parser.parse_args(["bench", "--model-path", MODEL, *options])


def plan_of(args):
    return cli.plan_of(args, Plan, ("requests", "concurrency"))


# -- the log -----------------------------------------------------------------------------------------------------------


def test_a_log_says_what_was_held_at_every_decode_step():
    assert parse_log(LOG) == Held(
        decode_steps=3,
        running_mean=2,
        running_peak=3,
        tokens_mean=150,
        tokens_peak=300,
        retractions=1,
        retracted_requests=2,
    )


def test_a_log_without_a_decode_step_is_an_error():
    with pytest.raises(ServerError, match="no decode line"):
        parse_log(LOG.splitlines()[0])


def test_counters_are_those_of_the_measurement_alone():
    def info(rounds, evicted):
        names = ("round_launches", "round_seconds", "requests_pruned", "requests_retracted", "blocks_freed_total")
        levels = ("policy", "budget_tokens", "interval", "recent", "layers", "held_peak_request")
        state = dict.fromkeys((*names, *levels, "auxiliary_bytes"), 1)
        return {"internal_states": [{"lethe": {**state, "rounds": rounds, "tokens_evicted_per_layer": evicted}}]}

    found = evicted(info(2, [5, 6]), info(9, [50, 66]), "lethe")
    assert (found["rounds"], found["tokens_evicted_per_layer"]) == (7, [45, 60])
    assert evicted(info(2, [5, 6]), info(2, [5, 6]), "idle")["rounds"] == 0
    with pytest.raises(ServerError, match="idle: 7 rounds"):
        evicted(info(2, [5, 6]), info(9, [50, 66]), "idle")
    with pytest.raises(ServerError, match="lethe: 0 rounds"):
        evicted(info(2, [5, 6]), info(2, [5, 6]), "lethe")
    with pytest.raises(ServerError, match="stock: the server evicts"):
        evicted(info(2, [5, 6]), info(2, [5, 6]), "stock")
    with pytest.raises(ServerError, match="plugin installed"):
        evicted({"internal_states": [{}]}, {"internal_states": [{}]}, "lethe")
    assert evicted({"internal_states": [{}]}, {"internal_states": [{}]}, "stock") is None


@pytest.mark.parametrize("short", [{"completed": 31}, {"total_output_tokens": 32 * 1024 - 1}])
def test_requests_that_lack_tokens_are_an_error(short):
    result = {"completed": 32, "total_output_tokens": 32 * 1024, "errors": ["", "context too short"]}
    _check_complete(PLAN, "stock", result)
    with pytest.raises(ServerError, match=r"stock: .* of 32 requests .* context too short"):
        _check_complete(PLAN, "stock", result | short)


# -- statistics and the page -------------------------------------------------------------------------------------------


def test_ratios_are_paired_within_a_repeat_before_their_median():
    speeds = {"stock": (10, 1000, 1), "idle": (9, 900, 0.9), "lethe": (20, 1000, 4)}
    measured = [measurement(arm, i + 1, tps) for arm, all_tps in speeds.items() for i, tps in enumerate(all_tps)]
    found = ratios(measured, PAIRS, RATIOS)
    assert found["lethe / stock"]["output throughput"] == Spread(2, 1, 4, [2, 1, 4])
    assert found["idle / stock"]["output throughput"].median == pytest.approx(0.9)
    assert list(found) == ["lethe / stock", "idle / stock", "lethe / idle"]


def test_a_repeat_without_one_of_the_arms_and_a_quantity_that_is_zero_have_no_ratio():
    found = ratios([measurement("stock", 1), measurement("lethe", 1, 30), measurement("stock", 2)], PAIRS, RATIOS)
    assert list(found) == ["lethe / stock"]
    assert found["lethe / stock"]["output throughput"].values == [3]
    assert "time to first token, p99" not in found["lethe / stock"]
    assert ratios([measurement("stock", 1)], PAIRS, RATIOS) == {}


def test_medians_are_taken_over_the_repeats_of_an_arm():
    measured = [measurement("lethe", 1, 10), measurement("lethe", 2, 40), measurement("lethe", 3, 20)]
    found = medians(measured, ARMS, ABSOLUTES | COUNTS)
    assert list(found) == ["lethe"]
    assert found["lethe"]["output throughput (tokens/s)"][:3] == (20, 10, 40)
    assert found["lethe"]["tokens evicted per layer, mean"].median == 200
    assert found["lethe"]["share of the time spent in rounds"].median == 0.05


@pytest.mark.parametrize(
    ("values", "text"),
    [([2, 2, 2], "2"), ([0.98765, 1, 1.5], "1 (0.988 to 1.5)"), ([1234.5, 1236.2], "1235 (1234 to 1236)")],
)
def test_a_spread_prints_its_median_and_its_range(values, text):
    assert str(Spread.of(values)) == text


def test_on_a_cpu_the_page_shows_ratios_and_no_speeds():
    page = to_markdown(PLAN, [measurement(arm, 1, 12.345) for arm in ARMS], ABOUT)
    assert "Absolute times on a shared CPU mean nothing" in page
    assert "| output throughput | 1 | 1 | 1 |" in page
    assert "12.3" not in page and "tokens/s" not in page
    assert "Unfinished" in page  # one repeat of three


def test_a_page_measured_beside_other_work_warns_of_its_times():
    found = [measurement(arm, 1) for arm in ARMS]
    assert "Disturbed" not in to_markdown(PLAN, found, ABOUT)
    assert "took up to 51% of the CPU" in to_markdown(PLAN, [*found, measurement("stock", 2, others=0.51)], ABOUT)


def test_on_a_gpu_the_page_shows_speeds_as_well():
    found = [measurement(arm, i, 12.345, device="cuda") for i in (1, 2, 3) for arm in ARMS]
    about = ABOUT._replace(machine=ABOUT.machine | {"gpus": ["Some GPU"]})
    page = to_markdown(PLAN, found, about)
    assert "| output throughput (tokens/s) | 12.3 | 12.3 | 12.3 |" in page
    assert "Some GPU" in page and "Unfinished" not in page


def test_every_row_of_a_table_has_as_many_cells_as_its_head():
    page = to_markdown(PLAN, [measurement(arm, 1) for arm in ("stock", "lethe")], ABOUT)
    widths = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert set(widths[:12]) == {3} and set(widths[12:]) == {4}


def test_the_json_holds_everything_but_names_no_place_of_this_machine():
    plan = replace(PLAN, server_args=("--chat-template", "/somewhere/private/template.jinja"))
    data = json.loads(json.dumps(to_json(plan, [measurement(arm, 1) for arm in ARMS], ABOUT)))
    assert data["ratios"]["lethe / stock"]["output throughput"]["median"] == 1
    assert data["configs"]["lethe"]["budget"]["tokens"] == 48 and "stock" not in data["configs"]
    assert [m["arm"] for m in data["measurements"]] == list(ARMS)
    assert data["server_commands"]["stock"][0] == "python" and "reasoner-dev" in data["client_command"]
    for private in (str(Path(MODEL).parent), sys.prefix, "/somewhere"):
        assert private not in json.dumps(data)


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_the_arms_differ_in_the_eviction_flags_alone():
    stock, idle, lethe = (PLAN.server_command(arm) for arm in ARMS)
    assert idle[: len(stock)] == lethe[: len(stock)] == stock
    assert not any("kv-evict" in word for word in stock)
    assert idle[-4:-1] == lethe[-4:-1] == ["--kv-evict", "lethe", "--kv-evict-config"]
    assert resolve(None, lethe[-1]) == CONFIG
    assert resolve(None, idle[-1]).budget.tokens > PLAN.input_len + PLAN.output_len


def test_the_idle_arm_is_never_due_whatever_the_allocation():
    config = resolve("h2o", '{"budget": {"allocation": "list", "layers": [40, 56]}, "debug": {"pack_always": true}}')
    idle = never_due(config, 1088)
    assert (idle.policy, idle.budget.allocation, idle.debug.pack_always) == ("h2o", "uniform", False)
    assert idle.budget.tokens > 1088
    limited = resolve("lethe", '{"requests": {"max_budget": 60}}', 48)
    assert never_due(limited, 1088).requests.max_budget is None


def test_the_client_sends_fixed_lengths_and_needs_no_data_set():
    command = PLAN.client_command(Path("out.json"))
    assert command[command.index("--dataset-name") + 1] == "random-ids" and "--tokenize-prompt" in command
    sampling = json.loads(command[command.index("--extra-request-body") + 1])["sampling_params"]
    assert sampling["ignore_eos"] is True and sampling["max_new_tokens"] == 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("stock", "fast")}, "--arms: unknown arm 'fast'; give one or more of stock,idle,lethe"),
        ({"arms": ("stock", "stock")}, "--arms stock,stock: give each arm at most once"),
        ({"arms": ()}, "--arms : give each arm at most once"),
        ({"max_total_tokens": 1090}, "--max-total-tokens 1090: cannot hold .* at least 1091"),
        ({"max_total_tokens": 1100, "page_size": 16}, "--max-total-tokens 1100: .* at least 1120"),
        ({"output_len": 49}, "--budget 48 with --interval 16: .* due at 49 .* --output-len 65"),
        ({"config": resolve("lethe", None, 1024)}, "--budget 1024 with --interval 128: .* --output-len 1153"),
        ({"config": CONFIG.model_copy(update={"policy": "none"})}, "--policy none: is the stock arm"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_with_a_legal_value(changes, message):
    PLAN.check()
    with pytest.raises(ConfigError, match=message):
        replace(PLAN, **changes).check()


def test_without_the_lethe_arm_a_budget_that_is_never_reached_is_fine():
    replace(PLAN, output_len=49, arms=("stock", "idle")).check()


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_options_become_a_plan():
    plan = plan_of(
        parsed(
            "--config",
            "cpu-demo",
            "--budget",
            "40",
            "--interval",
            "8",
            "--arms",
            "lethe, stock",
            "--server-args=--tp 2",
            "--page-size",
            "8",
        )
    )
    assert plan.config.budget.tokens == 40 and plan.config.rounds.interval == 8
    assert plan.config.requests == resolve(None, "cpu-demo").requests
    assert (plan.arms, plan.server_args, plan.page_size) == (("lethe", "stock"), ("--tp", "2"), 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "nowhere"], "--config nowhere: no such file"),
        (["--budget", "3"], "--budget 3: budget.tokens"),
        (
            ["--budget", "48", "--policy", "leth"],
            "--policy leth --budget 48: unknown policy 'leth' (did you mean 'lethe'?); legal: l",
        ),
        (["--budget", "48", "--server-args=--page-size=8"], "'--page-size=8' is set by lethe bench; use"),
        (["--budget", "48", "--server-args", "--tp '2"], "quote each argument"),
    ],
)
def test_errors_call_the_options_by_their_names_here(options, message, capsys):
    assert program.main(["bench", "--model-path", MODEL, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_model_and_a_busy_port_are_found_before_a_server_starts(capsys, tmp_path):
    assert program.main(["bench", "--model-path", str(tmp_path), "--budget", "48"]) == 2
    assert "give a directory with a config.json" in capsys.readouterr().err
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        assert not port_free(int(port))
        assert program.main(["bench", "--model-path", MODEL, "--budget", "48", "--port", port]) == 2
    assert f"--port {port}: {port} is in use; give another, such as --port " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--repeats=0", "--requests=-1", "--output-len=1", "--port=70000", "--budget=many"])
def test_numbers_out_of_range_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        parsed(option)
    assert f"argument {option.partition('=')[0]}: got " in capsys.readouterr().err


def test_the_command_line_is_written_down_without_paths(tmp_path):
    (tmp_path / "mine.yaml").write_text("budget: {tokens: 48}\n")
    private = str(tmp_path / "template.jinja")
    args = parsed("--config", str(tmp_path / "mine.yaml"), "--server-args", f"-c {private}", "--out", str(tmp_path))
    command = cli._command(args, plan_of(args))
    assert command.startswith("lethe bench --model-path reasoner-dev --config mine.yaml --input-len 64")
    assert str(tmp_path) not in command and "'-c template.jinja'" in command


def test_a_failure_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    def two_then_none(plan, say):
        yield measurement("stock", 1)
        yield measurement("lethe", 1, 25)
        raise ServerError("lethe: gone")

    monkeypatch.setattr(cli, "measure_all", two_then_none)
    options = ["--budget", "48", "--arms", "stock,lethe", "--out", str(tmp_path / "new"), "--port", "31999"]
    assert program.main(["bench", "--model-path", MODEL, *options]) == 1
    printed = capsys.readouterr()
    assert "error: lethe: gone" in printed.err
    assert "| output throughput | 2.5 |" in printed.out and "Unfinished" in printed.out
    assert len(json.loads((tmp_path / "new" / "bench.json").read_text())["measurements"]) == 2
    assert (tmp_path / "new" / "bench.md").read_text() == printed.out


# -- processes ---------------------------------------------------------------------------------------------------------

FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
{end}
"""


def running(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def ended(pid):
    """Whether a process ends within the time that a SIGKILL takes on a busy machine."""
    deadline = time.monotonic() + 5
    while (alive := running(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive


@pytest.mark.parametrize(
    ("end", "message"),
    [("time.sleep(60)", "--timeout 0.5"), ("print('reason'); sys.exit(3)", r"status 3:\n\d+\nreason")],
)
def test_a_client_that_fails_leaves_no_process(end, message, tmp_path):
    with pytest.raises(ServerError, match=message):
        run_client(
            [sys.executable, "-c", FAMILY.format(end=end)], tmp_path / "log", 0.5 if "sleep" in end else 20, print
        )
    first = (tmp_path / "log").read_text().split()
    assert not first or ended(int(first[0]))


def test_a_client_that_takes_long_is_reported_meanwhile(tmp_path):
    seen = []
    run_client([sys.executable, "-c", "import time; time.sleep(0.5)"], tmp_path / "log", 20, seen.append, every=0.1)
    assert len(seen) >= 2 and seen == sorted(seen)


def test_a_server_that_dies_is_an_error_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", FAMILY.format(end="sys.exit('no such model')")]
    with (
        pytest.raises(ServerError, match=r"status 1 before it was ready(.|\n)*no such model"),
        Server(command, 1, tmp_path / "log"),
    ):
        pass
    assert ended(int((tmp_path / "log").read_text().split()[0]))


HTTP = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"pid": %d}' % child.pid)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("how", ["leave", "interrupt", "terminate"])
def test_a_server_and_its_children_end_with_the_block(how, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    expected = {"leave": (), "interrupt": KeyboardInterrupt, "terminate": SystemExit}[how]
    with (
        pytest.raises(expected) if expected else contextlib.nullcontext(),
        ending_on_signals(),
        Server([sys.executable, "-c", HTTP, str(port)], port, tmp_path / "log") as server,
    ):
        child = server.get("/server_info")["pid"]
        assert running(child) and server.ready_seconds > 0
        if how != "leave":
            os.kill(os.getpid(), signal.SIGINT if how == "interrupt" else signal.SIGTERM)
            time.sleep(5)
    assert ended(child) and port_free(port)


def test_the_meter_counts_other_processes_and_not_the_server_or_its_client(tmp_path):
    spin = "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Server([sys.executable, "-c", HTTP, str(port)], port, tmp_path / "log") as server:
        meter = CpuMeter(server)
        run_client([sys.executable, "-c", spin], tmp_path / "client", 20, print)
        before = meter._read()
        exec(spin)  # this process is neither
        after = meter._read()
    assert after[1] - before[1] > 0.5 and sum(after[2:]) - sum(before[2:]) < 0.3
    assert before[3] - meter._start[3] > 0.2


def test_the_machine_is_described_by_its_hardware():
    found = machine()
    assert list(found) == ["cpu", "cores", "memory_gib", "gpus"]
    assert found["cores"] >= 1 and found["memory_gib"] > 0 and found["cpu"]
