"""Dashboards and alerts ask for metrics and labels that exist, in expressions that Prometheus understands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from k2dist.service.http_metrics import HttpMetrics
from k2dist.service.metric_table import METRICS
from k2dist.service.metrics import PREFIX
from k2dist.service.spans import OpenSpan

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
BOARD = DEPLOY / "grafana" / "k2dist.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
FROM_PROMETHEUS = {"le", "instance", "job"}
PROMTOOL = shutil.which("promtool")


def exported() -> dict[str, set[str]]:
    """Labels by the name of each series that `/metrics` can show."""
    found: dict[str, set[str]] = {}
    for metric in METRICS:
        endings = ("",)
        if metric.kind is CounterMetricFamily:
            endings = ("_total",)
        elif metric.kind is HistogramMetricFamily:
            endings = ("_bucket", "_count", "_sum")  # type: ignore[assignment]
        for ending in endings:
            found[PREFIX + metric.name + ending] = {"model_name", *metric.labels}
    http = HttpMetrics("m")
    http.begin("openai", OpenSpan(None, "")).end("success")
    http.show(None)
    for family in http.registry.collect():
        for sample in family.samples:
            found[sample.name] = set(sample.labels)
    return found


def board_expressions() -> Iterator[str]:
    board = json.loads(BOARD.read_text())
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield re.sub(r"label_values\((\w+), (\w+)\)", r"count by (\2) (\1)", variable["query"]["query"])


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


EXPRESSIONS = [*board_expressions(), *(rule["expr"] for rule in rules())]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_and_label_exists(expression: str) -> None:
    series = exported()
    names = re.findall(r"\bk2dist_\w+", expression)
    assert names, "it asks for nothing of ours"
    assert [name for name in names if name not in series] == []
    labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression))
    for listed in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        labels |= {label.strip() for label in listed.split(",")}
    assert labels <= set.union(FROM_PROMETHEUS, *(series[name] for name in names))


def test_every_metric_that_is_ours_alone_is_on_the_board_or_wakes_somebody() -> None:
    """What nobody looks at need not be counted; these few are for searching when something is wrong."""
    asked = {name for expression in EXPRESSIONS for name in re.findall(r"\bk2dist_\w+", expression)}
    unasked = [m.name for m in METRICS if not any(name.startswith(PREFIX + m.name) for name in asked)]
    assert set(unasked) == {
        "num_tokens_waiting",
        "lane_silent",
        "rank_host_seconds",
        "rank_device_seconds",
        "rank_tokens_sampled",
        "rank_steps_replayed",
        "rank_decodes_eager",
        "rank_graphs",
        "dispatch_rows_sent",
        "masks_seconds",
        "collective_calls",
        "recovery_seconds",
    }


def test_every_alert_leads_to_its_part_of_the_runbook() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"deploy/README.md#alert-{rule['alert'].lower()}"
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(BOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool on this machine: apt-get install prometheus")
def test_prometheus_understands_every_expression(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    plain = [expression.replace("$__rate_interval", "5m") for expression in board_expressions()]
    board = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(plain)]
    (tmp_path / "board.yaml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": board}]}))
    for path in (ALERTS, tmp_path / "board.yaml"):
        done = subprocess.run(
            [PROMTOOL, "check", "rules", str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
