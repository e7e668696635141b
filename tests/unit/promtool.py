"""The rules of ``promtool check metrics``: promtool itself is no Python package."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families as families

ABBREVIATED = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d"}
TYPES = {"counter", "gauge", "histogram", "summary", "untyped"}
UNITS = {
    *("milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "weeks"),
    *("bits", "kilobytes", "megabytes", "gigabytes", "kibibytes", "mebibytes", "gibibytes", "percent"),
}


def lint(text):
    """What ``promtool check metrics`` finds, but for the colon, which every metric of SGLang has."""
    found = []
    for family in families(text):
        kind, words = family.type, set(re.split("[_:]", family.name))
        name = family.name + "_total" * (kind == "counter")  # the parser takes it off; without it there is no counter
        names = {sample.name for sample in family.samples}
        labels = {label for sample in family.samples for label in sample.labels}
        if not family.documentation:
            found.append(f"{name}: no help text")
        if kind == "unknown" or (kind == "counter" and not names <= {name}):
            found.append(f"{name}: a counter's name ends in _total")
        if kind != "counter" and family.name.endswith("_total"):
            found.append(f"{name}: only a counter's name ends in _total")
        if kind != "histogram" and (family.name.endswith(("_count", "_sum", "_bucket")) or "le" in labels):
            found.append(f"{name}: reserved for histograms")
        if words & TYPES:
            found.append(f"{name}: the type stands in the name")
        if words & (ABBREVIATED | UNITS):
            found.append(f"{name}: units are base units, written out")
        if re.search("[a-z][A-Z]", "".join([family.name, *labels])):
            found.append(f"{name}: camel case")
    return found
