"""``lethe profiles``: two profiles compared, layer by layer, and drawn."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lethe_sglang.allocation.profile import STATISTICS, Profile, load
from lethe_sglang.cli.show_profile import number, render, table
from lethe_sglang.config import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe profiles``."""
    parser = subparsers.add_parser(
        "profiles",
        description="Print the tables of one or two profiles and how they differ: other prompts, another seed, a "
        "fine-tune. --plot draws them.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a profile")
    parser.add_argument("other", metavar="OTHER", type=Path, nargs="?", help="another one, to compare")
    parser.add_argument(
        "--plot", metavar="OUT", type=Path, help="draw sparsity and budgets per layer (.png, .pdf, .svg)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables of one or two profiles, draw them if asked to, and return the exit status.

    Raises
    ------
    ConfigError
        If a file is no profile, two cannot be compared, or the plot cannot be drawn.
    """
    paths = [args.file] if args.other is None else [args.file, args.other]
    names, profiles = [path.name for path in paths], [load(path) for path in paths]
    parts = [render(profile, name) for profile, name in zip(profiles, names, strict=True)]
    if len(profiles) == 2:
        parts.append(compare(*profiles))
    if args.plot is not None:
        draw(profiles, names, args.plot)
        parts.append(f"drawn to {args.plot}")
    print("\n\n".join(parts))
    return 0


def compare(first: Profile, second: Profile) -> str:
    """Compare two profiles: what differs in the model, and per statistic the rank correlation over layers.

    Raises
    ------
    ConfigError
        If they have different numbers of layers.
    """
    if first.model.layers != second.model.layers:
        raise ConfigError(
            f"got profiles of {first.model.layers} and {second.model.layers} layers; "
            "only profiles with as many layers can be compared"
        )
    differing = [*first.model.differences(second.model), *first.model.numeric_differences(second.model)]
    rows = [["statistic", "rank correlation over layers", "largest difference", "of spread over prompts"]]
    for name in STATISTICS:
        a, b = first.statistics[name], second.statistics[name]
        gap = [abs(x - y) for x, y in zip(a.mean, b.mean, strict=True)]
        layer = max(range(len(gap)), key=gap.__getitem__)
        spread = max(a.spread[layer], b.spread[layer])
        ratio = number(gap[layer] / spread) if spread > 0 else "-"
        rows.append([name, number(rank_correlation(a.mean, b.mean)), f"{number(gap[layer])} (layer {layer})", ratio])
    same = f"the same model: {'no: ' + ', '.join(differing) if differing else 'yes'}"
    return "\n".join([same, "", *table(rows)])


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
