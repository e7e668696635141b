"""``lethe top``: what a running server evicts, live in the terminal.

A frame is one scrape of the server's Prometheus page, whose names the dashboard of ``configs/grafana`` has, too; so the
server needs ``--enable-metrics``, but no key, and its scheduler is not asked.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.live import Live
from rich.table import Table

from lethe_sglang.config import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

Rows = Iterator[tuple[str, str]]

EVICT, QUALITY = "sglang:kv_evict_", "sglang:kv_evict_quality_"
TIMEOUT_SECONDS = 10
BAR_COLUMNS = 24


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe top``."""
    parser = subparsers.add_parser(
        "top",
        description="Show what a server with --kv-evict and --enable-metrics does: requests, its pool, rounds, what "
        "they evicted, the share under pressure, and quality where it is watched. Ctrl-C ends it.",
        allow_abbrev=False,
    )
    parser.add_argument("url", metavar="URL", help="the server's, such as http://127.0.0.1:30000")
    parser.add_argument("--once", action="store_true", help="print one frame and exit, for pipes and scripts")
    parser.add_argument(
        "--interval", metavar="SECONDS", type=_seconds, default=2.0, help="time between two frames (default: 2)"
    )


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.1 <= (seconds := float(text)) <= 3600:
            return seconds
    raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds from 0.1 to 3600")


def run(args: argparse.Namespace) -> int:
    """Show frames until Ctrl-C, or one with ``--once``, and return the exit status.

    Raises
    ------
    ConfigError
        If the URL does not lead to a server that evicts and exports metrics, or there is no terminal to draw on.
    """
    console = Console()
    if not (args.once or console.is_terminal):
        raise ConfigError("the output is not a terminal; give --once for one frame")
    page = scrape(args.url)
    if args.once:
        with console.capture() as captured:
            console.print(frame(args.url, page))
        print(captured.get(), end="")  # a reader that has gone is main's to report
        return 0
    with contextlib.suppress(KeyboardInterrupt), Live(frame(args.url, page), console=console, screen=True) as live:
        while True:
            before, since = page, time.monotonic()
            time.sleep(args.interval)
            page = scrape(args.url)
            live.update(frame(args.url, page, before, time.monotonic() - since), refresh=True)
    return 0


class Page:
    """The numbers of one scrape, name -> labels and value of each.

    Of the tensor-parallel ranks of a replica, which hold the same, it has the first; of data-parallel ones, all.
    """

    def __init__(self, text: str) -> None:
        self.samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("tp_rank", "0") == "0":
                    self.samples.setdefault(sample.name, []).append((sample.labels, sample.value))

    def __getitem__(self, name: str) -> float:
        """Sum of a number over its labels; 0 where it is not exported."""
        return math.fsum(value for _, value in self.samples.get(name, ()) if not math.isnan(value))

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sum a number over all labels but one: value of that label -> number."""
        return self._by(name, label, math.fsum)

    def each(self, name: str, label: str = "dp_rank") -> dict[str, float]:
        """Return a number of which replicas have their own or the same: value of the label -> the largest."""
        return self._by(name, label, max)

    def _by(self, name: str, label: str, join: Callable[[list[float]], float]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for labels, value in self.samples.get(name, ()):
            found.setdefault(labels.get(label, ""), []).append(value)
        return {key: join(values) for key, values in sorted(found.items())}


def scrape(url: str) -> Page:
    """Read a server's metrics.

    Raises
    ------
    ConfigError
        One line: what is wrong with the URL or the server, and what to do.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"URL: got {url!r}, expected one like http://127.0.0.1:30000")
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=TIMEOUT_SECONDS) as response:
            found = response.read()
    except urllib.error.HTTPError as error:
        hint = "; start the server with --enable-metrics" if error.code == 404 else ""
        raise ConfigError(f"URL: {url} answers {error.code} to /metrics{hint}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error or type(error).__name__).split())
        raise ConfigError(f"URL: {url} does not answer ({reason})") from None
    try:
        page = Page(found.decode())
    except ValueError:
        raise ConfigError(f"URL: {url} has a /metrics page that is not Prometheus'; is it SGLang's?") from None
    if not any(name.startswith(EVICT) for name in page.samples):
        raise ConfigError(f"URL: {url} exports no metrics of eviction; start SGLang with --kv-evict, see lethe show")
    return page


def frame(url: str, page: Page, before: Page | None = None, seconds: float = 0.0) -> Table:
    """Draw one frame; with a page from ``seconds`` before it, it shows rates."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    (labels, _), *_ = page.samples[f"{EVICT}rounds_total"]
    grid.add_row("lethe top", f"{url}  {labels.get('model_name', '')}")
    if (replicas := len(page.each(f"{EVICT}rounds_total"))) > 1:
        grid.add_row("replicas", f"{replicas} data-parallel ones, added up")
    for name, text in (*_memory(page), *_eviction(page, before, seconds), *_quality(page)):
        grid.add_row(name, text)
    return grid


def _memory(page: Page) -> Rows:
    running, queued, speed = (
        page[f"sglang:{name}"] for name in ("num_running_reqs", "num_queue_reqs", "gen_throughput")
    )
    retracted = page[f"{EVICT}requests_retracted_total"]
    yield "requests", f"{running:,.0f} running, {queued:,.0f} queued, {retracted:,.0f} retracted; {speed:,.0f} token/s"
    total, used = page["sglang:max_total_num_tokens"], page["sglang:kv_used_tokens"]
    part = min(used / total, 1.0) if total else 0.0
    bar = f"{'#' * round(part * BAR_COLUMNS):-<{BAR_COLUMNS}} {part:.0%}"
    cached = page["sglang:kv_evictable_tokens"]
    yield "pool", f"{bar}: {used:,.0f} of {total:,.0f} tokens used, {cached:,.0f} cached"
    held, saved = page[f"{EVICT}held_blocks"], page[f"{EVICT}saved_blocks"]
    part = saved / (held + saved) if saved else 0.0
    yield "held", f"{held:,.0f} blocks by running requests, {saved:,.0f} saved ({part:.0%})"


def _eviction(page: Page, before: Page | None, seconds: float) -> Rows:
    def number(name: str, form: str = ",.0f") -> str:
        return format(page[EVICT + name], form)

    def counted(name: str) -> str:
        grown = page[EVICT + name] - before[EVICT + name] if before is not None else 0.0
        return number(name) + (f" ({grown / seconds:,.1f}/s)" if before is not None else "")

    steps, spent = page[f"{EVICT}round_seconds_count"], page[f"{EVICT}round_seconds_sum"]
    each = f", {1e3 * spent / steps:,.1f} ms in a step that has any" if steps else ""
    yield "rounds", counted("rounds_total") + each
    yield "evicted", f"{counted('blocks_freed_total')} blocks freed, {number('requests_pruned_total')} requests pruned"
    layers = page.each(f"{EVICT}layers", "layer_group")
    for group, cells in sorted(page.by(f"{EVICT}evicted_cells_total", "layer_group").items()):
        yield "", f"{cells / max(layers.get(group, 1), 1):,.0f} tokens in each of the layers {group}"
    events = page[f"{EVICT}pressure_events_total"]
    shares = " and ".join(f"{share:,.0f}" for share in page.each(f"{EVICT}pressure_share_tokens").values()) or "0"
    last = f"share {shares} at the last of {events:,.0f} events" if events else "no event yet"
    floor = max(page.each(f"{EVICT}budget_tokens").values(), default=0)
    yield "pressure", f"{last}; {number('requests_at_floor')} requests at the floor of {floor:,.0f}"


def _quality(page: Page) -> Rows:
    """Show what is exported of quality: of a histogram the mean, of a counter its value."""
    agree = page.by(f"{QUALITY}tokens_total", "agree")
    if tokens := math.fsum(agree.values()):
        yield "quality", f"first choices agree in {agree.get('yes', 0) / tokens:.1%} of {tokens:,.0f} tokens"
    for name in sorted(filter(lambda name: name.startswith(QUALITY), page.samples)):
        stem = name.removeprefix(QUALITY)
        if stem.endswith("_count") and page[name]:
            mean = page[name.removesuffix("_count") + "_sum"] / page[name]
            yield "quality", f"{stem.removesuffix('_count')}: {mean:.4g} on average of {page[name]:,.0f}"
        elif stem.endswith("_total"):
            yield "quality", f"{stem.removesuffix('_total')}: {page[name]:,.0f}"
