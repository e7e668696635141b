"""The figures of an accuracy report: accuracy against memory, tokens kept per layer, which tokens were kept when."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_MARKERS = "osD^vP*X<>hp"
_DPI = 130


class Point(NamedTuple):
    """One arm of one series: memory and accuracy with its interval, as shares in [0, 1]."""

    memory: float
    accuracy: float
    low: float
    high: float


class Picture(NamedTuple):
    """A file that was written beside the report, and what it shows."""

    file: str
    caption: str


def available() -> bool:
    """Whether matplotlib is installed (extra ``bench``)."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        return False
    return True


def plot_accuracy(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[Point]]], full: Mapping[str, Point]
) -> Picture:
    """Draw accuracy against memory, one line per series.

    Parameters
    ----------
    path
        PNG to write.
    panels
        Title of a panel -> series -> its points.
    full
        Title of a panel -> the full cache; empty where that was not measured.
    """
    figure, axes = _panels(len(panels), 4.6)
    series = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = importlib.import_module("matplotlib").colormaps["tab20"]
    for ax, (title, lines) in zip(axes, panels.items(), strict=False):
        if title in full:
            ax.axhline(100 * full[title].accuracy, color="black", linewidth=1, label="full")
            ax.axhspan(100 * full[title].low, 100 * full[title].high, color="black", alpha=0.08)
        for name, points in lines.items():
            ordered = sorted(points)
            number = series.index(name)
            x = [100 * point.memory for point in ordered]
            y = [100 * point.accuracy for point in ordered]
            below = [100 * max(point.accuracy - point.low, 0.0) for point in ordered]
            above = [100 * max(point.high - point.accuracy, 0.0) for point in ordered]
            style = {"linewidth": 2.4, "zorder": 5} if name == "lethe" else {"linewidth": 1.2}
            ax.errorbar(
                x,
                y,
                yerr=[below, above],
                label=name,
                color=colours(number % 20),
                capsize=2,
                elinewidth=0.7,
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                linestyle="--" if name == "random" else "-",
                **style,
            )
        ax.set(title=title, xlabel="KV memory held while decoding, % of stock", ylabel="right answers, %")
        ax.grid(alpha=0.25)
    axes[0].legend(fontsize=7, ncols=2)
    _save(figure, path)
    return Picture(path.name, "Accuracy against memory, with 95 % intervals; the band is the full cache.")


def plot_layers(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Picture:
    """Draw the tokens kept per layer after a round: title of a panel -> series -> one number per layer."""
    figure, axes = _panels(len(panels), 4.0)
    colours = importlib.import_module("matplotlib").colormaps["tab20"]
    for ax, (title, lines) in zip(axes, panels.items(), strict=False):
        for number, (name, kept) in enumerate(lines.items()):
            ax.plot(
                range(len(kept)),
                kept,
                label=name,
                color=colours(number % 20),
                linewidth=1,
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4,
            )
        ax.set(title=title, xlabel="layer", ylabel="tokens kept besides prefix and tail", ylim=(0, None))
        ax.grid(alpha=0.25)
    axes[0].legend(fontsize=7, ncols=2)
    _save(figure, path)
    return Picture(path.name, "Tokens that a layer keeps after a round, mean over the rounds of the traced problems.")


def plot_kept(path: Path, panels: Mapping[str, Sequence[Mapping[str, Any]]]) -> Picture:
    """Draw which tokens survived: name of an arm -> the rounds of one traced request."""
    figure, axes = _panels(len(panels), 3.4)
    for ax, (name, rounds) in zip(axes, panels.items(), strict=False):
        ax.imshow(kept_share(rounds), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
        ax.set_title(name, fontsize=9)
        ax.set(xlabel="token after the shared prefix", ylabel="round")
    _save(figure, path)
    return Picture(
        path.name,
        "Share of the layers that keep a token after a round of one problem: dark none, bright all; white is the tail, "
        "which every layer keeps.",
    )


def kept_share(rounds: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float64]:
    """Turn a traced request into a picture.

    Parameters
    ----------
    rounds
        As in ``traces.jsonl``: ``prefix``, ``tail`` and, per layer, the ``kept`` logical positions.

    Returns
    -------
    ndarray
        ``[rounds, tokens after the prefix]``: share of the layers that keep a token, NaN from the tail on.
    """
    start = min((entry["prefix"] for entry in rounds), default=0)
    width = max((entry["tail"] for entry in rounds), default=start) - start
    image = np.full((len(rounds), width), np.nan)
    for row, entry in enumerate(rounds):
        image[row, : entry["tail"] - start] = 0
        image[row, : entry["prefix"] - start] = 1
        for layer in entry["kept"]:
            own = np.asarray([position for position in layer if position >= entry["prefix"]], dtype=np.int64)
            image[row, own - start] += 1 / len(entry["kept"])
    return image


def kept_per_layer(traces: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean number of tokens that each layer keeps after a round, over all rounds of some traced requests."""
    counts = [[len(layer) for layer in entry["kept"]] for trace in traces for entry in trace["rounds"]]
    return [statistics.fmean(column) for column in zip(*counts, strict=True)]


def _panels(count: int, height: float) -> tuple[Any, list[Any]]:
    """Make a figure with at least ``count`` axes, at most three in a row; the superfluous ones are hidden."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure_class = importlib.import_module("matplotlib.figure").Figure
    figure = figure_class(figsize=(max(5.0 * columns, 6.5), height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=_DPI)
