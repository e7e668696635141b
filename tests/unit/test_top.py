"""``lethe top``: one frame of numbers, rates between two, and one line for whatever is not a server that evicts."""

from __future__ import annotations

import io
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from closed_pipe import closed

from lethe_sglang.cli import main as cli
from lethe_sglang.cli import top

LABELS = 'model_name="reasoner",tp_rank="0"'
METRICS = f"""
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{{{LABELS}}} 12
# TYPE sglang:kv_used_tokens gauge
sglang:kv_used_tokens{{{LABELS}}} 1500
# TYPE sglang:max_total_num_tokens gauge
sglang:max_total_num_tokens{{{LABELS}}} 2000
# TYPE sglang:kv_evict_rounds_total counter
sglang:kv_evict_rounds_total{{{LABELS}}} 1234
sglang:kv_evict_rounds_total{{model_name="reasoner",tp_rank="1"}} 1234
# TYPE sglang:kv_evict_held_blocks gauge
sglang:kv_evict_held_blocks{{{LABELS}}} 900
# TYPE sglang:kv_evict_saved_blocks gauge
sglang:kv_evict_saved_blocks{{{LABELS}}} 300
# TYPE sglang:kv_evict_evicted_cells_total counter
sglang:kv_evict_evicted_cells_total{{layer_group="0-2",{LABELS}}} 300
sglang:kv_evict_evicted_cells_total{{layer_group="3",{LABELS}}} 7
# TYPE sglang:kv_evict_layers gauge
sglang:kv_evict_layers{{layer_group="0-2",{LABELS}}} 3
sglang:kv_evict_layers{{layer_group="3",{LABELS}}} 1
# TYPE sglang:kv_evict_round_seconds histogram
sglang:kv_evict_round_seconds_bucket{{le="+Inf",{LABELS}}} 100
sglang:kv_evict_round_seconds_count{{{LABELS}}} 100
sglang:kv_evict_round_seconds_sum{{{LABELS}}} 0.5
"""
PRESSED = f"""
# TYPE sglang:kv_evict_pressure_events_total counter
sglang:kv_evict_pressure_events_total{{{LABELS}}} 5
# TYPE sglang:kv_evict_pressure_share_tokens gauge
sglang:kv_evict_pressure_share_tokens{{{LABELS}}} 64
# TYPE sglang:kv_evict_quality_k3 histogram
sglang:kv_evict_quality_k3_bucket{{le="+Inf",{LABELS}}} 4
sglang:kv_evict_quality_k3_count{{{LABELS}}} 4
sglang:kv_evict_quality_k3_sum{{{LABELS}}} 0.05
# TYPE sglang:kv_evict_quality_skipped_total counter
sglang:kv_evict_quality_skipped_total{{{LABELS}}} 9
# TYPE sglang:kv_evict_quality_tokens_total counter
sglang:kv_evict_quality_tokens_total{{agree="yes",reason="interval",{LABELS}}} 50
sglang:kv_evict_quality_tokens_total{{agree="yes",reason="pressure",{LABELS}}} 25
sglang:kv_evict_quality_tokens_total{{agree="no",reason="interval",{LABELS}}} 25
"""


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def serve():
    """A server of one page: returns its address."""
    servers = []

    def start(text, status=200):
        class Page(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status if self.path == "/metrics" else 500)
                self.end_headers()
                self.wfile.write(text.encode("latin-1"))

            def log_message(self, *args):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Page))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def told(capsys, *arguments):
    status = cli.main(["top", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_one_frame_says_what_the_page_says(serve, capsys):
    status, out, err = told(capsys, serve(METRICS) + "/", "--once")
    assert (status, err) == (0, "") and "\x1b" not in out and "reasoner" in out
    assert re.search(r"requests +12 running, 0 queued, 0 retracted", out)
    assert re.search(r"pool +#{18}-{6} 75%: 1,500 of 2,000 tokens used", out)
    assert re.search(r"held +900 blocks by running requests, 300 saved \(25%", out)
    assert re.search(r"rounds +1,234, 5\.0 ms in a step", out), "a second rank's number was added"
    assert re.search(r"  100 tokens in each of the layers 0-2\s+7 tokens in each of the layers 3", out)
    assert re.search(r"pressure +no event yet", out)
    assert "quality" not in out and "/s" not in out.replace("token/s", "")


def test_pressure_and_quality_are_shown_where_they_are_exported(serve, capsys):
    _, out, _ = told(capsys, serve(METRICS + PRESSED), "--once")
    assert re.search(r"pressure +share 64 at the last of 5 events", out)
    assert re.search(r"quality +k3: 0\.0125 on average of 4\s", out)
    assert re.search(r"quality +first choices agree in 75\.0% of 100 tokens\s", out)
    assert re.search(r"quality +skipped: 9\s", out)


def test_of_data_parallel_replicas_it_shows_the_sum_and_of_what_is_the_same_one():
    floor = f"# TYPE sglang:kv_evict_budget_tokens gauge\nsglang:kv_evict_budget_tokens{{{LABELS}}} 48\n"
    lines = (METRICS + PRESSED + floor).splitlines()
    both = [line.replace('tp_rank="0"', f'tp_rank="0",dp_rank="{rank}"') for line in lines for rank in "01"]
    other = [line.replace("} 64", "} 32") if 'dp_rank="1"' in line and "share" in line else line for line in both]
    table = top.frame("u", top.Page("\n".join(dict.fromkeys(other))))
    rows = dict(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert rows["replicas"] == "2 data-parallel ones, added up"
    assert rows["requests"].startswith("24 running") and rows["rounds"].startswith("2,468, 5.0 ms")
    assert rows["pool"].endswith("3,000 of 4,000 tokens used, 0 cached")
    assert rows["pressure"] == "share 64 and 32 at the last of 10 events; 0 requests at the floor of 48"
    assert rows[""] == "14 tokens in each of the layers 3", "what both have freed"


def test_a_second_frame_has_rates():
    before, later = top.Page(METRICS), top.Page(METRICS.replace('rank="0"} 1234', 'rank="0"} 1244'))
    rows = dict(zip(*(list(column.cells) for column in top.frame("u", later, before, 4.0).columns), strict=True))
    assert rows["rounds"].startswith("1,244 (2.5/s)")


@pytest.mark.parametrize(
    ("text", "status", "expected"),
    [
        ("", 404, "answers 404 to /metrics; start the server with --enable-metrics"),
        ("", 500, "answers 500 to /metrics"),
        ("<html>hello</html>", 200, "has a /metrics page that is not Prometheus'; is it SGLang's?"),
        ("\xff", 200, "has a /metrics page that is not Prometheus'; is it SGLang's?"),
        ("sglang:num_running_reqs 1\n", 200, "exports no metrics of eviction; start SGLang with --kv-evict"),
    ],
)
def test_another_server_is_one_line(serve, capsys, text, status, expected):
    found, out, err = told(capsys, url := serve(text, status), "--once")
    assert (
        (found, out) == (2, "") and err.startswith(f"lethe top: error: URL: {url} {expected}") and err.count("\n") == 1
    )


def test_a_wrong_url_is_one_line(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for wrong, expected in {
        url: "does not answer (",
        "http://127.0.0.1:0x": "does not answer (",
        "http://": "does not answer (",
        "127.0.0.1:30000": "expected one like http://127.0.0.1:30000",
        "file:///etc/hostname?": "expected one like http://127.0.0.1:30000",
    }.items():
        status, out, err = told(capsys, wrong, "--once")
        assert (status, out) == (2, "") and err.startswith("lethe top: error: URL: ") and expected in err, err
        assert err.count("\n") == 1


def test_without_a_terminal_one_frame_has_to_be_asked_for(serve, capsys):
    status, out, err = told(capsys, serve(METRICS))
    assert (status, out, err) == (2, "", "lethe top: error: the output is not a terminal; give --once for one frame\n")


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "x", "1e9"])
def test_an_interval_is_seconds(capsys, interval):
    with pytest.raises(SystemExit):
        cli.main(["top", "http://127.0.0.1:1", "--interval", interval])
    assert f"got '{interval}', expected seconds from 0.1 to 3600" in capsys.readouterr().err


def test_a_frame_whose_reader_has_gone_ends_without_a_word(serve):
    assert closed("top", serve(METRICS), "--once", no_proxy="127.0.0.1") == (141, "")


def test_ctrl_c_is_the_way_to_leave(serve, monkeypatch):
    class Screen(top.Console):
        is_terminal = True

    def leave(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(top, "Console", lambda: Screen(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(top.time, "sleep", leave)
    assert cli.main(["top", serve(METRICS)]) == 0
