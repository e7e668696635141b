"""The pictures of ``lethe eval fidelity``: what is lost in two measures, and where along a reply."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lethe_bench.statistics import Mean

_MARKERS = "osD^vP*X<>hp"


def tradeoff(path: Path, arms: Mapping[str, tuple[Mean, Mean]]) -> None:
    """Draw each arm's KL against what recall loses, with intervals (SVG)."""
    figure, (axes,) = side_by_side(1)
    for number, (arm, (kl, recall)) in enumerate(arms.items()):
        axes.errorbar(
            kl.mean,
            recall.mean,
            xerr=_bars([kl]),
            yerr=_bars([recall]),
            label=arm,
            **style(number),
            elinewidth=0.7,
        )
    axes.set(xlabel="KL(full || arm), nats a step", ylabel="NLL of values above full, nats a token")
    axes.set(xlim=(0, None), ylim=(min(0, axes.get_ylim()[0]), None))
    finish(figure, [axes], path)


def _bars(means: Sequence[Mean]) -> list[list[float]]:
    """Return how far intervals reach below and above their means; of one document that is no more than rounding."""
    return [[max(m.mean - m.low, 0.0) for m in means], [max(m.high - m.mean, 0.0) for m in means]]


def curves(path: Path, panels: Mapping[str, Mapping[str, tuple[NDArray[Any], NDArray[Any]]]]) -> None:
    """Draw KL along a reply (SVG): the title of a panel, what its x is, -> arm -> x and mean KL."""
    figure, all_axes = side_by_side(len(panels))
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for number, (arm, (x, y)) in enumerate(lines.items()):
            axes.plot(x, y, label=arm, **style(number), linewidth=1)
        axes.set(xlabel=title, ylabel="KL(full || arm), nats", ylim=(0, None))
    finish(figure, all_axes, path)


def against_share(path: Path, levels: Sequence[tuple[float, Mapping[str, tuple[float, float]]]]) -> None:
    """Draw KL and what values lose against the part of the own tokens that is kept (SVG): a share, and arm -> both."""
    figure, all_axes = side_by_side(2)
    titles = ("KL(full || arm), nats a step", "NLL of values above full, nats a token")
    for measure, (axes, title) in enumerate(zip(all_axes, titles, strict=True)):
        for number, arm in enumerate(dict.fromkeys(arm for _, arms in levels for arm in arms)):
            points = [(share, arms[arm][measure]) for share, arms in levels if arm in arms]
            axes.plot(*zip(*points, strict=True), label=arm, **style(number), linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks([share for share, _ in levels], [f"{share:.3g}" for share, _ in levels])
        axes.set(xlabel="part of the own tokens that is kept", ylabel=title, ylim=(0, None))
    finish(figure, all_axes, path)


def against_load(path: Path, means: Mapping[int, Mapping[str, Mapping[str, Mean]]]) -> None:
    """Draw KL and what recall loses, with intervals, against load (SVG): load -> arm -> measure -> mean."""
    titles = {"kl": "KL(full || arm), nats a step", "recall": "NLL of values above full, nats a token"}
    known = [name for name in titles if any(name in found for arms in means.values() for found in arms.values())]
    figure, all_axes = side_by_side(len(known))
    for axes, name in zip(all_axes, known, strict=True):
        for number, arm in enumerate(dict.fromkeys(arm for arms in means.values() for arm in arms)):
            points = {load: arms[arm][name] for load, arms in means.items() if name in arms.get(arm, {})}
            middle = [mean.mean for mean in points.values()]
            axes.errorbar(
                list(points), middle, yerr=_bars([*points.values()]), label=arm, **style(number), elinewidth=0.7
            )
        axes.set(xlabel="documents at once", ylabel=titles[name])
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(means), map(str, means))
    finish(figure, all_axes, path)


def by_position(steps: Sequence[NDArray[Any]], bins: int = 20) -> tuple[NDArray[Any], NDArray[Any]]:
    """Average KL, ``[T]`` a document, over documents and runs of positions: their middles and the means."""
    parts = np.array_split(np.mean(steps, axis=0), bins)
    ends = np.cumsum([len(part) for part in parts])
    return ends - np.array([len(part) for part in parts]) / 2, np.array([part.mean() for part in parts])


def by_distance(steps: Sequence[NDArray[Any]], rounds: Sequence[Sequence[int]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Average KL over all steps that are as far behind their last round: steps since it, from 0, and the means."""
    sums: dict[int, list[float]] = {}
    for kl, starts in zip(steps, rounds, strict=True):
        for start, end in zip(starts, [*starts[1:], len(kl)], strict=True):
            for distance, value in enumerate(kl[start:end].tolist()):
                sums.setdefault(distance, []).append(value)
    most = max(map(len, sums.values()), default=0)
    known = sorted(distance for distance, values in sums.items() if 2 * len(values) >= most)
    return np.array(known), np.array([np.mean(sums[distance]) for distance in known])


def style(number: int) -> dict[str, Any]:
    """Return how the line of that number looks."""
    colours = importlib.import_module("matplotlib").colormaps["tab20"]
    return {"color": colours(number % 20), "marker": _MARKERS[number % len(_MARKERS)], "markersize": 5}


def side_by_side(count: int) -> tuple[Any, list[Any]]:
    """Return a figure and its panels, side by side."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(6.5 * count, 4.8), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False).flat)


def finish(figure: Any, all_axes: Sequence[Any], path: Path) -> None:
    """Write a figure (SVG), the same bytes for the same numbers."""
    for axes in all_axes:
        axes.grid(alpha=0.25)
    all_axes[0].legend(fontsize=7, ncols=2)
    with importlib.import_module("matplotlib").rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})
