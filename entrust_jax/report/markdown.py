"""Tables as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: its head, a rule, a line for each row."""
    return [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]]


def figure(one: Mapping[str, Any] | None) -> str:
    """A figure of `metrics.statistics` as value [low, high]; '-' where there is none."""
    if one is None or one["value"] is None:
        return "-"
    interval = one["ci95"]
    return f"{one['value']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
