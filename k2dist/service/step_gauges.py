"""Estimate and measurement side by side, for Prometheus: two gauges, each with a `source`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge

from k2dist._proto.v1 import control_pb2


class StepGauges:
    """In `registry`, of one gateway. Without a pair they are left out: old ones would be lies."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._model = model
        labels = ("model_name", "source")
        self._step = Gauge(
            "k2dist_decode_step_seconds",
            "One step of all lanes at the present load: as estimated, as measured since the last scrape.",
            labels,
            registry=registry,
        )
        self._tokens = Gauge(
            "k2dist_decode_tokens_per_second",
            "Of all lanes, a token for each running output and step.",
            labels,
            registry=registry,
        )

    def show(self, topology: control_pb2.GetTopologyResponse | None) -> None:
        for gauge in (self._step, self._tokens):
            gauge.clear()
        if topology is None or not topology.HasField("step"):
            return
        step = topology.step
        for source, step_s, tokens_per_s in (
            ("estimate", step.estimated_step_s, step.estimated_tokens_per_s),
            ("measured", step.measured_step_s, step.measured_tokens_per_s),
        ):
            self._step.labels(self._model, source).set(step_s)
            self._tokens.labels(self._model, source).set(tokens_per_s)
