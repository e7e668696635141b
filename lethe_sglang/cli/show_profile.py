"""A profile as a table, for ``lethe show profile`` and ``lethe profile``."""

from __future__ import annotations

from lethe_sglang.allocation.profile import Profile

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


def render(profile: Profile, name: str = "profile") -> str:
    """Write a profile as a table: one row a layer, mean and, where it tells something, spread over prompts."""
    model, prompts, cost = profile.model, profile.prompts, profile.cost
    budgets = profile.budgets
    sensitive, forced = profile.sensitivity, profile.fidelity
    found = [
        (part, name)
        for part, names in ((sensitive, ("changed", "lost")), (forced, ("kl", "recall")))
        if part
        for name in names
    ]
    header = ["layer", *_COLUMNS, *(name for _, name in found), f"budget of {budgets.tokens}"]
    rows = []
    for layer in range(model.layers):
        cells = []
        for column in _COLUMNS:
            statistic = profile.statistics[column]
            spread = f" ±{number(statistic.spread[layer])}" if column == "hoyer" else ""
            cells.append(number(statistic.mean[layer]) + spread)
        cells += [number(getattr(part, column)[layer]) for part, column in found]
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
        + (f"; changed, lost: {sensitive.prompts} answers, one layer pruned to {sensitive.kept}" if sensitive else "")
        + (f"; kl, recall: {forced.documents} forced replies, one layer pruned to {forced.kept}" if forced else ""),
        "",
    ]
    return "\n".join([*about, *table([header, *rows])])


def number(value: float) -> str:
    """Write a number with as many digits as a measurement has."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def table(rows: list[list[str]]) -> list[str]:
    """Return the lines of a table, the first row its header, with every column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
