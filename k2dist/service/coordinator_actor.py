"""The coordinator as a process: reads what it needs of the model, joins the lanes, listens for gRPC.

A plain class with async methods, so that tests run it as it is and `cluster` makes a Ray actor of it
(`ray.remote(CoordinatorActor)`); nothing here imports ray, nor torch: it costs a tokenizer's memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from k2dist.config import read_architecture
from k2dist.config.cluster import ClusterConfig, split_address
from k2dist.config.generation_config import read_sampling_defaults
from k2dist.coordinator import new_request_id
from k2dist.errors import CheckpointError, ConfigError, UnavailableError
from k2dist.grammar import Grammars
from k2dist.messages import LaneLoad, Message
from k2dist.observe import Journey, RequestBook
from k2dist.observe.event_log import EventLog, set_up_logs
from k2dist.service.auth import Gate
from k2dist.service.bounds import max_requests
from k2dist.service.cluster_watch import ClusterWatch
from k2dist.service.control_servicer import ControlServicer
from k2dist.service.coordinator import Coordinator, CoordinatorLimits
from k2dist.service.encoding import Encoder
from k2dist.service.forward import Forwarder
from k2dist.service.generation import AnswerStyle, Generation
from k2dist.service.grpc_server import GrpcServer
from k2dist.service.health_keeper import HealthKeeper
from k2dist.service.lane import Lane
from k2dist.service.observe_server import ObserveServicer
from k2dist.service.planning import Planning
from k2dist.service.served_model import ServedModel
from k2dist.service.spans import Spans, open_spans
from k2dist.service.state import StateWatch
from k2dist.service.supervision import Supervision
from k2dist.service.template_process import TemplateProcess
from k2dist.service.tls import inner_tls, server_credentials
from k2dist.text.own_template import TEMPLATE_FILE
from k2dist.text.tokenizer import Tokenizer, end_token_ids

_log = EventLog(logging.getLogger(__name__))
_MORE_STREAMS = 256  # of one connection, for calls that do not generate and for those that are refused


class CoordinatorStats(Message, frozen=True, kw_only=True):
    """What the coordinator sees of its cluster now."""

    address: str
    is_draining: bool
    num_queued: int  # requests that no lane has taken yet
    num_outputs: int  # under way in all lanes
    lanes: tuple[LaneLoad, ...]  # those that live


class CoordinatorActor:
    """`lanes[i]` is lane i. `start` before all else, on the event loop that then belongs to it.

    model_name: what clients call the model; the directory's name if not given. inner_key: by which this
    cluster's gateway is known. supervision: who knows the ranks; None: nobody does.
    """

    def __init__(
        self,
        config: ClusterConfig,
        model_dir: str | Path,
        lanes: Sequence[Lane],
        model_name: str | None = None,
        *,
        inner_key: str = "",
        supervision: Supervision | None = None,
    ) -> None:
        self._config = config
        self._model_dir = Path(model_dir)
        self._model_name = model_name or self._model_dir.resolve().name
        self._lanes = tuple(lanes)
        self._inner_key = inner_key
        self._supervision = supervision
        self._parts: _Parts | None = None

    async def enter_process(self) -> None:
        """It is a process of its own: let it log as the config says."""
        set_up_logs(self._config.observe.log_level, self._config.observe.log_format, process="coordinator")

    async def start(self) -> str:
        """Serve, and return the address. CapacityError: the port is taken. CheckpointError: no such model.
        ConfigError: a file of `service` cannot be read."""
        service = self._config.service
        gate = Gate(service.api_keys, inner_key=self._inner_key)
        credentials = server_credentials(service.tls) if service.tls.is_on else None
        forwarder = Forwarder(inner_tls(service.tls))
        tokenizer = Tokenizer.load(self._model_dir)
        observe = self._config.observe
        spans = open_spans("coordinator", self._config.name, observe.otlp_endpoint, observe.trace_share)
        coordinator: Coordinator[AnswerStyle] = Coordinator(
            self._lanes, _limits(self._config), book=RequestBook(partial(_tell_end, spans))
        )
        model = self._read_model(tokenizer)
        encoder = self._make_encoder(tokenizer, Grammars(tokenizer, model.end_token_ids))
        generation = Generation(
            model,
            tokenizer,
            encoder,
            coordinator,
            gate,
            lambda: new_request_id(forwarder.home, str(uuid.uuid4())),
        )
        planning = Planning(self._config, self._model_name, read_architecture(self._model_dir))
        watch = ClusterWatch(coordinator, first_revision=int(1000 * time.time()))
        state = StateWatch(
            self._config.name,
            model.name,
            coordinator,
            self._supervision,
            stall_s=stall_s(self._config),
            step_pair=planning.step_pair,
        )
        server = GrpcServer(
            generation,
            ControlServicer(self._config.name, model.name, coordinator, watch, planning, self.drain),
            ObserveServicer(state, coordinator.book, gate),
            gate,
            forwarder,
            max_streams=max_requests(self._config) + _MORE_STREAMS,
        )
        host, port = _split(service.grpc)
        try:
            port = await server.start(host, port, credentials)
        except BaseException:
            encoder.close()
            spans.close()
            raise
        coordinator.start()
        if self._supervision is not None:
            watch.follow(self._supervision)
        await server.set_serving(True)
        keeper = HealthKeeper(state, lambda: coordinator.num_outputs > 0, server.set_serving)
        keeper.start()
        shown = f"[{host}]" if ":" in host else host
        self._parts = _Parts(f"{shown}:{port}", coordinator, encoder, server, watch, forwarder, keeper, spans)
        return self._parts.address

    async def join(self, home: int, addresses: Sequence[str]) -> None:
        """Be coordinator `home` of several, which listen at `addresses`; requests of others are forwarded
        there. Once, before there are requests. Each has lanes of its own."""
        self._started().forwarder.join(home, addresses)

    async def address(self) -> str:
        return self._started().address

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Take no new requests and wait for the accepted; false if some go on after `deadlines.drain_s`."""
        parts = self._started()
        await parts.keeper.stop()
        await parts.server.set_serving(False)
        limit_s = self._config.deadlines.drain_s if timeout_s is None else timeout_s
        return await parts.coordinator.drain(limit_s)

    async def stop(self) -> None:
        """End everything at once: open streams get UNAVAILABLE, the lanes are left as they are."""
        if self._parts is None:
            return
        parts, self._parts = self._parts, None
        await parts.keeper.stop()
        await parts.server.stop(grace_s=0.0)
        await parts.watch.stop()
        await parts.forwarder.close()
        await parts.coordinator.stop()
        parts.encoder.close()
        await asyncio.to_thread(parts.spans.close)

    async def stats(self) -> CoordinatorStats:
        parts = self._started()
        return CoordinatorStats(
            address=parts.address,
            is_draining=parts.coordinator.is_draining,
            num_queued=parts.coordinator.num_queued,
            num_outputs=parts.coordinator.num_outputs,
            lanes=await parts.coordinator.loads(),
        )

    def _make_encoder(self, tokenizer: Tokenizer, grammars: Grammars) -> Encoder:
        """CheckpointError: the config asks for the checkpoint's own template, and it has none that works."""
        service = self._config.service
        is_own = service.chat_template == "checkpoint"
        template = TemplateProcess(self._model_dir / TEMPLATE_FILE) if is_own else None
        return Encoder(tokenizer, grammars, template=template, specials_in_text=service.specials_in_text)

    def _read_model(self, tokenizer: Tokenizer) -> ServedModel:
        architecture = read_architecture(self._model_dir)
        if tokenizer.vocab_size > architecture.vocab_size:
            raise CheckpointError(
                f"{self._model_dir}: {tokenizer.vocab_size} ids in the tokenizer, but vocab_size is "
                f"{architecture.vocab_size} in config.json; they belong to different models"
            )
        cache = self._config.cache
        in_pages = cache.page_tokens * cache.num_pages
        pages = f"a lane's cache (cache.num_pages={cache.num_pages} of {cache.page_tokens} tokens)"
        return ServedModel(
            name=self._model_name,
            max_positions=min(architecture.max_positions, in_pages),
            holder=pages if in_pages < architecture.max_positions else "the context",
            vocab_size=tokenizer.vocab_size,
            end_token_ids=end_token_ids(tokenizer, architecture.eos_token_ids),
            defaults=read_sampling_defaults(self._model_dir),
        )

    def _started(self) -> _Parts:
        if self._parts is None:
            raise UnavailableError("the coordinator is not running; call start first")
        return self._parts


class _Parts:
    """What runs between `start` and `stop`."""

    def __init__(
        self,
        address: str,
        coordinator: Coordinator[AnswerStyle],
        encoder: Encoder,
        server: GrpcServer,
        watch: ClusterWatch,
        forwarder: Forwarder,
        keeper: HealthKeeper,
        spans: Spans,
    ) -> None:
        self.address = address
        self.coordinator = coordinator
        self.encoder = encoder
        self.server = server
        self.watch = watch
        self.forwarder = forwarder
        self.keeper = keeper
        self.spans = spans


def _limits(config: ClusterConfig) -> CoordinatorLimits:
    return CoordinatorLimits(
        max_queued=config.service.max_queued,
        queue_s=config.service.queue_s,
        lane_outputs=config.scheduler.max_running,
        log_bytes=config.service.log_bytes,
        retain_s=config.service.retain_s,
    )


def _tell_end(spans: Spans, journey: Journey) -> None:
    spans.tell(journey)
    _log.info(
        "request.ended",
        request_id=journey.request_id,
        tenant=journey.tenant,
        lane=journey.lane,
        prompt_tokens=journey.num_prompt_tokens,
        tokens=sum(way.num_tokens for way in journey.outputs),
        finish=[way.finish for way in journey.outputs],
        error=journey.error,
        total_s=round((journey.ended_s or journey.arrived_s) - journey.arrived_s, 3),
    )


def stall_s(config: ClusterConfig) -> float:
    """Half of what a collective may take: health names who is late before the step is given up."""
    return config.deadlines.step_s / 2


def _split(address: str) -> tuple[str, int]:
    parts = split_address(address)
    if parts is None:
        raise ConfigError(f"service.grpc={address!r}: use host:port, such as 127.0.0.1:50051")
    return parts
