"""``lethe show profile``: a profile as a table, two compared, and drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lethe_sglang.allocation.profile import STATISTICS, Profile, load
from lethe_sglang.config import ConfigError

_COLUMNS = (
    "hoyer",
    "entropy",
    "coverage_90",
    "coverage_95",
    "coverage_99",
    "distance",
    "sink_share",
    "concentration",
    "recurrence",
)


def show(paths: Sequence[Path], plot: Path | None) -> str:
    """Return the tables of one or two profiles, and draw them if asked to.

    Raises
    ------
    ConfigError
        If a file is no profile, two cannot be compared, or the plot cannot be drawn.
    """
    profiles = [load(path) for path in paths]
    names = [path.name for path in paths]
    text = "\n\n".join(render(profile, name) for profile, name in zip(profiles, names, strict=True))
    if len(profiles) == 2:
        text += f"\n\n{compare(profiles[0], profiles[1])}"
    if plot is not None:
        draw(profiles, names, plot)
        text += f"\n\ndrawn to {plot}"
    return text


def render(profile: Profile, name: str = "profile") -> str:
    """Write a profile as a table: one row a layer, mean and, where it tells something, spread over prompts."""
    model, prompts, cost = profile.model, profile.prompts, profile.cost
    budgets = profile.budgets
    sensitive = profile.sensitivity
    found = () if sensitive is None else ("changed", "lost")
    header = ["layer", *_COLUMNS, *found, f"budget of {budgets.tokens}"]
    rows = []
    for layer in range(model.layers):
        cells = []
        for column in _COLUMNS:
            statistic = profile.statistics[column]
            spread = f" ±{_number(statistic.spread[layer])}" if column == "hoyer" else ""
            cells.append(_number(statistic.mean[layer]) + spread)
        cells += [_number(getattr(sensitive, column)[layer]) for column in found]
        rows.append([str(layer), *cells, str(budgets.layers[layer])])
    numerics = model.dtype + (f", {model.quantization}" if model.quantization else "")
    versions = ", ".join(f"{package} {version}" for package, version in profile.versions.items())
    about = [
        f"{name}: {model.name} ({model.architecture}, {model.layers} layers, {model.heads} query and "
        f"{model.kv_heads} KV heads of {model.head_dim}, {numerics})",
        f"{prompts.count} prompts ({prompts.source}), {prompts.queries} decode queries; a prompt has "
        f"{prompts.prompt_tokens:.0f} tokens and its answer {prompts.answer_tokens:.0f} on average",
        f"measured in {cost.measuring_seconds:.0f} s ({cost.total_seconds:.0f} s with loading), "
        f"{cost.statistics_bytes / 2**20:.1f} MiB of statistics; {versions}",
        f"budget by {profile.rule}{f' ** {profile.alpha:g}' if profile.alpha != 1 else ''}"
        + (f"; changed, lost: {sensitive.prompts} answers, one layer pruned to {sensitive.kept}" if sensitive else ""),
        "",
    ]
    return "\n".join([*about, *_table([header, *rows])])


def compare(first: Profile, second: Profile) -> str:
    """Compare two profiles: what differs in the model, and per statistic the rank correlation over layers.

    Raises
    ------
    ConfigError
        If they have different numbers of layers.
    """
    if first.model.layers != second.model.layers:
        raise ConfigError(
            f"lethe show profile: got profiles of {first.model.layers} and {second.model.layers} layers; "
            "only profiles with as many layers can be compared"
        )
    differing = [*first.model.differences(second.model), *first.model.numeric_differences(second.model)]
    rows = [["statistic", "rank correlation over layers", "largest difference", "of spread over prompts"]]
    for name in STATISTICS:
        a, b = first.statistics[name], second.statistics[name]
        gap = [abs(x - y) for x, y in zip(a.mean, b.mean, strict=True)]
        layer = max(range(len(gap)), key=gap.__getitem__)
        spread = max(a.spread[layer], b.spread[layer])
        ratio = _number(gap[layer] / spread) if spread > 0 else "-"
        rows.append([name, _number(rank_correlation(a.mean, b.mean)), f"{_number(gap[layer])} (layer {layer})", ratio])
    same = f"the same model: {'no: ' + ', '.join(differing) if differing else 'yes'}"
    return "\n".join([same, "", *_table(rows)])


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; nan if either does not vary."""

    def ranks(values: Sequence[float]) -> list[float]:
        ordered = sorted(values)
        return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]

    a, b = ranks(first), ranks(second)
    middle = (len(a) - 1) / 2
    above = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    below = math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))
    return above / below if below > 0 else math.nan


def draw(profiles: Sequence[Profile], names: Sequence[str], out: Path) -> None:
    """Draw sparsity, its spread and the budgets of every layer, of one or two profiles.

    Raises
    ------
    ConfigError
        If the file cannot be written.
    """
    import matplotlib  # without it `lethe` says what to install

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    width = 0.8 / len(profiles)
    for i, (profile, name) in enumerate(zip(profiles, names, strict=True)):
        layers = range(profile.model.layers)
        hoyer = profile.statistics["hoyer"]
        label = f"{profile.model.name}: {name}"
        above.errorbar(layers, hoyer.mean, yerr=hoyer.spread, marker="o", capsize=3, label=label)
        shift = (i - (len(profiles) - 1) / 2) * width
        below.bar([layer + shift for layer in layers], profile.budgets.layers, width=width, label=label)
    above.set_ylabel("Hoyer sparsity (± over prompts)")
    above.legend(fontsize=8)
    below.set_ylabel(f"tokens kept (mean {profiles[0].budgets.tokens})")
    below.set_xlabel("layer")
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {out}: cannot be written: {error}; give a .png, .pdf or .svg file") from None
    finally:
        pyplot.close(figure)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
