"""A cluster's state as Prometheus reads it: `metric_table` says what is shown, this shows it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from k2dist.observe import HistogramFacts
from k2dist.service.metric_table import METRICS, FamilyKind, Shown, Value

PREFIX = "k2dist_"


class StateCollector(Collector):
    """Shows what it was last given. Given nothing it is silent: old values would be lies."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.shown: Shown | None = None

    def collect(self) -> Iterator[Family]:
        if self.shown is None:
            return
        for metric in METRICS:
            family = metric.kind(PREFIX + metric.name, metric.text, labels=("model_name", *metric.labels))
            for labels, value in metric.read(self.shown):
                _add(family, (self._model, *labels), value)
            yield family


def _add(family: FamilyKind, labels: tuple[str, ...], value: Value) -> None:
    if isinstance(value, HistogramFacts):
        assert isinstance(family, HistogramMetricFamily), f"{family.name} is no histogram"
        num_below, buckets = 0, []
        for bound, count in zip((*map(str, value.bounds), "+Inf"), value.counts, strict=True):
            num_below += count
            buckets.append((bound, num_below))
        family.add_metric(labels, buckets, value.total)
    else:
        assert not isinstance(family, HistogramMetricFamily), f"{family.name} is a histogram"
        family.add_metric(labels, value)
