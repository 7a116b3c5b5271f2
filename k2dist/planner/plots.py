"""A simulation's curves: one HTML file that needs nothing else, in light and dark, or one SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from k2dist.planner.report import SimulationReport

WIDTH, HEIGHT = 620, 220
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 34
COLOURS = ("#2a78d6", "#eb6834", "#1baf7a")

_HEAD = 24  # pixels above each plot of a sheet, for its name
_STYLE_OF_SVG = """
svg text { font-size: 11px; fill: currentColor; }
svg .grid { stroke: currentColor; stroke-opacity: .15; }
"""
_STYLE = (
    _STYLE_OF_SVG
    + """
:root { color-scheme: light dark; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1320px; padding: 0 1rem; }
h2 { font-size: 1rem; margin: 0 0 .2rem; }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; }
table { border-collapse: collapse; margin-bottom: 1.5rem; } td { padding: .1rem 1rem .1rem 0; }
td + td { text-align: right; font-variant-numeric: tabular-nums; }
"""
)


class Curve(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]


class Plot(NamedTuple):
    """`body`: SVG within WIDTH x HEIGHT."""

    title: str
    body: str


class Mark(NamedTuple):
    """A moment to draw a line at."""

    name: str
    at: float


def page(title: str, rows: Sequence[tuple[str, str]], report: SimulationReport) -> str:
    """The whole file. `rows`: what is told in figures above the curves."""
    table = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    body = "".join(
        f'<figure style="margin:0"><h2>{escape(one.title)}</h2><svg role="img" aria-label='
        f'"{escape(one.title)}" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"{one.body}</svg></figure>"
        for one in _plots(report)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1><p>Computed by <code>k2dist plan</code> under a "
        f"virtual clock: scheduler, router and pages are the real ones, the devices' time is an estimate.</p>"
        f'<table>{table}</table><div class="plots">{body}</div></html>\n'
    )


def sheet(title: str, report: SimulationReport) -> str:
    """The plots as one picture on white, two beside each other: for where a page may show no HTML."""
    parts = []
    plots = _plots(report)
    for index, one in enumerate(plots):
        x, y = index % 2 * WIDTH, _HEAD + index // 2 * (HEIGHT + _HEAD)
        name = f'<text x="{LEFT}" y="-8" font-weight="bold">{escape(one.title)}</text>'
        parts.append(f'<g transform="translate({x} {y})">{name}{one.body}</g>')
    width, height = 2 * WIDTH, -(-len(plots) // 2) * (HEIGHT + _HEAD)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} '
        f'{height}" style="color:#222" font-family="system-ui, sans-serif"><title>{escape(title)}</title>'
        f"<style>{_STYLE_OF_SVG}</style>"
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _plots(report: SimulationReport) -> Sequence[Plot]:
    moments = report.moments
    loss = report.loss
    marks = () if loss is None else (Mark(f"rank {loss.world_rank} lost", loss.at_s),)

    def over_time(name: str, field: str, scale: float = 1.0) -> Curve:
        return Curve(name, [(moment.at_s, scale * getattr(moment, field)) for moment in moments])

    return (
        plot("tokens/s out", "s", [over_time("output", "output_tokens_per_s")], marks),
        plot("prompt tokens/s", "s", [over_time("prompts", "prompt_tokens_per_s")], marks),
        plot(
            "sequences",
            "s",
            [over_time("running", "num_running"), over_time("waiting", "num_waiting")],
            marks,
        ),
        plot("pages in use, %", "s", [over_time("pages", "pages_used", 100.0)], marks),
        plot("a step, ms", "s", [over_time("step", "step_s", 1e3)], marks),
        plot("requests whose first token came within, %", "s", [_shares(report.ttfts_s, 1.0)]),
        plot("requests whose tokens came within, %", "ms", [_shares(report.tpots_s, 1e3)]),
    )


def _shares(values: Sequence[float], scale: float) -> Curve:
    ordered = sorted(values)
    count = max(len(ordered), 1)
    return Curve(
        "share", [(scale * value, 100.0 * (index + 1) / count) for index, value in enumerate(ordered)]
    )


def plot(title: str, unit: str, curves: Sequence[Curve], marks: Sequence[Mark] = ()) -> Plot:
    """Both axes begin at 0."""
    points = [point for curve in curves for point in curve.points]
    most_x = _round_up(max((x for x, _ in points), default=0.0))
    most_y = _round_up(max((y for _, y in points), default=0.0))
    parts = [*_axes(most_x, most_y, unit)]
    for mark in marks:
        x = _x(mark.at, most_x)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="currentColor" '
            f'stroke-dasharray="4 3"/><text x="{x + 4:.1f}" y="{TOP + 10}">{escape(mark.name)}</text>'
        )
    for index, curve in enumerate(curves):
        line = " ".join(f"{_x(x, most_x):.1f},{_y(y, most_y):.1f}" for x, y in curve.points)
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{line}"/>')
        if len(curves) > 1:
            parts.append(
                f'<text x="{WIDTH - RIGHT}" y="{TOP + 10 + 14 * index}" text-anchor="end" '
                f'style="fill:{colour}">{escape(curve.name)}</text>'
            )
    return Plot(title, "".join(parts))


def _axes(most_x: float, most_y: float, unit: str) -> Sequence[str]:
    parts = []
    for index in range(5):
        value = most_y * index / 4
        y = _y(value, most_y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(value)}</text>')
    for index in range(6):
        value = most_x * index / 5
        label = f"{_label(value)} {unit}" if index == 5 else _label(value)
        anchor, y = "end" if index == 5 else "middle", HEIGHT - BOTTOM + 16
        parts.append(f'<text x="{_x(value, most_x):.1f}" y="{y}" text-anchor="{anchor}">{label}</text>')
    return parts


def _x(value: float, most: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * value / most


def _y(value: float, most: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / most


def _round_up(value: float) -> float:
    """To a number of one or two digits and noughts; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** (len(f"{value:.0f}") - 1) if value >= 1 else 1.0
    while power > value:
        power /= 10
    return next(step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * power >= value)


def _label(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:g}"
