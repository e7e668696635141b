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
    figure, (axes,) = _panels(1)
    for number, (arm, (kl, recall)) in enumerate(arms.items()):
        axes.errorbar(
            kl.mean,
            recall.mean,
            xerr=[[kl.mean - kl.low], [kl.high - kl.mean]],
            yerr=[[recall.mean - recall.low], [recall.high - recall.mean]],
            label=arm,
            **_style(number),
            elinewidth=0.7,
        )
    axes.set(xlabel="KL(full || arm), nats a step", ylabel="NLL of values above full, nats a token")
    axes.set(xlim=(0, None), ylim=(min(0, axes.get_ylim()[0]), None))
    _finish(figure, [axes], path)


def curves(path: Path, panels: Mapping[str, Mapping[str, tuple[NDArray[Any], NDArray[Any]]]]) -> None:
    """Draw KL along a reply (SVG): the title of a panel, what its x is, -> arm -> x and mean KL."""
    figure, all_axes = _panels(len(panels))
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for number, (arm, (x, y)) in enumerate(lines.items()):
            axes.plot(x, y, label=arm, **_style(number), linewidth=1)
        axes.set(xlabel=title, ylabel="KL(full || arm), nats", ylim=(0, None))
    _finish(figure, all_axes, path)


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


def _style(number: int) -> dict[str, Any]:
    colours = importlib.import_module("matplotlib").colormaps["tab20"]
    return {"color": colours(number % 20), "marker": _MARKERS[number % len(_MARKERS)], "markersize": 5}


def _panels(count: int) -> tuple[Any, list[Any]]:
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(6.5 * count, 4.8), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False).flat)


def _finish(figure: Any, all_axes: Sequence[Any], path: Path) -> None:
    for axes in all_axes:
        axes.grid(alpha=0.25)
    all_axes[0].legend(fontsize=7, ncols=2)
    with importlib.import_module("matplotlib").rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})
