"""One cluster as its YAML file states it: strict, every field with its unit and its trade-off.

Only `name` and `parallel` have to be given. Defaults suit one machine without a GPU. Fields that contradict
each other are found by `faults_between`; `load.py` reports them together with all other faults.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from typing import Annotated, Literal

from msgspec import Meta

from k2dist.messages import Message

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]

# Of a layer's load on a rank, where that is to be captured. By the planner's arithmetic: not measured yet.
GPU_CAPACITY_FACTOR = 1.25
MOST_FRAMED_RANKS = 16
# The largest port; a server asked for port 0 takes a free one.
MAX_PORT = 65535


class ParallelConfig(Message, frozen=True, kw_only=True):
    """How many ranks there are and what they share. World size: lanes * tp + expert_only_ranks."""

    lanes: Count  # batches side by side; more: more cache and throughput, the weights of attention once each
    tp: Count  # ranks that share a lane's attention; more: less memory a rank, a reduction more per layer
    # Hold experts and serve no lane: memory for weights only.
    expert_only_ranks: Annotated[int, Meta(ge=0)] = 0
    # Experts that each rank holds per layer; none: each expert once in all. More: second copies, which cost
    # cache and let a rank or a node die without an expert being read again.
    slots_per_rank: Count | None = None

    @property
    def world_size(self) -> int:
        return self.lanes * self.tp + self.expert_only_ranks


class CacheConfig(Message, frozen=True, kw_only=True):
    """The latent cache of one lane, the same on each of its ranks."""

    page_tokens: Count = 64  # a power of two; larger: shorter page tables, more unused at a sequence's end
    num_pages: Count = 256  # of each lane; more: more and longer sequences at a time, more memory
    # Let a prompt begin with pages that were generated: a next turn starts sooner, and its bits may differ
    # from those of a prompt that was computed as one.
    reuse_generated: bool = False


class SchedulerConfig(Message, frozen=True, kw_only=True):
    """Bounds of one lane's scheduler; all counts are per lane."""

    step_tokens: Count = 2048  # rows of one step; more: prompts finish sooner, each token comes later
    chunk_tokens: Count = 512  # prompt rows of one sequence in one step; less: fairer among prompts
    # Prompts are computed in every so many steps, on all lanes in the same ones; more: tokens come sooner
    # beside prompts, and prompts take longer.
    prefill_every: Count = 1
    max_running: Count = 256  # sequences that hold pages; more: higher throughput, slower each
    max_waiting: Count = 1024  # admitted sequences without pages; more: fuller lanes, longer waits
    ageing_s: Seconds = 60.0  # waiting so long counts as one priority; more: low ones wait longer


class ExchangeConfig(Message, frozen=True, kw_only=True):
    """How rows reach the ranks of their experts."""

    # In steps without prompts: room for so many times an even router's load on a rank (and its spread by
    # chance) is sent, used or not, and nobody waits to hear how much comes. More: more bytes; less: a step
    # that does not fit is computed twice. None: exact, at one more exchange in each layer. auto: 1.25 on up
    # to 16 GPUs, since what is captured as a graph needs a capacity; exact on more, where frames send 2.3
    # times as much (32 ranks, 256 rows a lane) to 5 times (128); exact on a CPU, where over gloo the two take
    # equally long.
    capacity_factor: Annotated[float, Meta(ge=1)] | Literal["auto"] | None = "auto"
    # Rows of a step from which it is computed in two halves where exchanges are exact, one's exchange behind
    # the other's attention. Less: more is hidden, and weights are read twice more often. None: never. Over
    # gloo it never paid, since both need the cores (2 of them: 0.43 s for 0.44 at 1,024 rows a lane, 0.12 for
    # 0.085 at 128).
    split_tokens: Count | None = None


class RanksConfig(Message, frozen=True, kw_only=True):
    """What one rank takes of a machine. Ray counts these; it does not enforce them."""

    # Let ranks differ in kernels, torch or kind of device. A request's bits then depend on its lane, and it
    # may go on otherwise after a recovery than it would have; without it such a world is refused.
    allow_mix: bool = False
    rank_cpus: Annotated[float, Meta(gt=0)] = 1.0  # share of the cores Ray counts; a fraction oversubscribes
    rank_gpus: Annotated[float, Meta(ge=0)] = 0.0  # 1 on GPU machines, 0 where ranks compute on the CPU
    # cpu: experts' weights stay in the machine's memory and are computed there, all else on the GPU: a model
    # that the GPUs do not hold, at the speed of that memory. auto: with all else.
    experts_device: Literal["auto", "cpu"] = "auto"
    # Of generated rows alone on GPUs: auto: recorded and replayed. off: to look for a fault without them.
    graphs: Literal["auto", "off"] = "auto"
    threads: Count = 1  # of each rank's arithmetic; more than its cores only makes them wait for each other
    # Of lanes, without nodes.num_nodes. pack: on few machines; spread: on many; strict_*: so or not at all.
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"


class NodesConfig(Message, frozen=True, kw_only=True):
    """The machines, as far as what fits on them and what survives has to be known before they are rented."""

    # Machines, each with as many ranks, neighbouring ranks on one; none: the ranks of a lane share one, and
    # losses are counted in ranks only.
    num_nodes: Count | None = None
    # What one rank computes on, by its name in `k2dist/planner/devices.py` (h200, b200, cpu, ...): its memory
    # and its rates; none: the CPU if ranks take no GPU, else `k2dist plan` asks for it.
    device: str | None = None
    # Memory of one rank's device (its share of the machine, without a GPU), as its driver reports it and not
    # as its maker does; none: that of `device`, and without either nothing is checked before ranks start.
    device_bytes: Count | None = None
    # Of each device, for what no plan counts: the driver's context, kernels' code, the buffers of NCCL,
    # fragmentation. Less: more cache, and the first long prompt may find none left.
    reserve_bytes: Annotated[int, Meta(ge=0)] = 8 * 2**30


class NetworkConfig(Message, frozen=True, kw_only=True):
    """Where processes of this cluster listen for each other."""

    # Of rendezvous and collectives. An address keeps all ranks on one machine; "node" is, for each process,
    # the address by which Ray knows its node. Names are never looked up.
    address: str = "127.0.0.1"


class DeadlinesConfig(Message, frozen=True, kw_only=True):
    """How long each thing may take before it counts as failed. Shorter finds a failure sooner, and sooner
    takes slowness for one."""

    # Machines that have not joined the Ray yet; 0: refuse at once what Ray has no room for. More where pods
    # or machines come up by themselves.
    nodes_s: Annotated[float, Meta(ge=0)] = 0.0
    # One collective of a step: what a rank waits for its peers. At half of it /health is red, and names who.
    step_s: Seconds = 60.0
    start_s: Seconds = 120.0  # the placement group, and then each process
    load_s: Seconds = 3600.0  # one rank's shard: its bytes, at the speed of the storage
    join_s: Seconds = 60.0  # all ranks meeting in a generation
    # After that, on GPUs: graphs of decode steps, one for each size. Sizes that are left by then are launched
    # kernel by kernel in this generation, or padded to a larger one.
    record_s: Seconds = 300.0
    call_s: Seconds = 30.0  # an answer to one control call: admit, cancel, stats
    drain_s: Seconds = 30.0  # accepted requests, once the cluster is to end
    stop_s: Seconds = 10.0  # ranks leaving their loops; the placement group's removal
    lease_beat_s: Seconds = 1.0  # how often the driver says that it lives
    lease_s: Seconds = 30.0  # without a beat; at least three beats, or one late beat ends the cluster

    @property
    def joined_s(self) -> float:
        """A rank keeps join_s and record_s itself; one that has not joined after both hangs."""
        return self.join_s + self.record_s


class RayConfig(Message, frozen=True, kw_only=True):
    """For a Ray that k2dist starts itself; one that it joins is as it is."""

    num_cpus: Count | None = None  # what Ray may hand out; none: as many as the machine has
    # Shared memory for what passes through Ray: requests and events, never weights. Ray's least is 75 MiB.
    object_store_bytes: Annotated[int, Meta(ge=75 * 2**20)] = 80 * 2**20


class TlsConfig(Message, frozen=True, kw_only=True):
    """Certificates of the gRPC and HTTP servers: paths of PEM files on the machines where they run. Read
    again when they change. Without `cert` both speak in the clear."""

    cert: str | None = None  # the chain, the server's own first
    key: str | None = None  # its private key, not encrypted
    # mTLS: who connects, to either server, must show a certificate signed by one of these CAs. Health checks
    # and scrapers too. The gateway shows `cert`, which has to be good for clients as well.
    client_ca: str | None = None
    # By whom `cert` is signed, for the gateway to know the coordinator by; "system": a public CA.
    ca: str | None = None
    # The name in `cert` that the gateway expects; none: the host of the coordinator's address.
    name: str | None = None

    @property
    def is_on(self) -> bool:
        return self.cert is not None


class ServiceConfig(Message, frozen=True, kw_only=True):
    """The coordinator with its gRPC server, and the HTTP gateway before it."""

    # host:port to listen on; port 0: any free one; 0.0.0.0 is open to the network.
    grpc: str = "127.0.0.1:50051"
    # As `grpc`, for clients of OpenAI's and Anthropic's APIs, health checks and metrics; null: no gateway.
    http: str | None = "127.0.0.1:8000"
    max_queued: Count = 1024  # requests not yet accepted; more: fewer refusals, longer waits
    queue_s: Seconds = 60.0  # how long one may wait to be accepted before it is refused
    retain_s: Seconds = 60.0  # how long an ended request can be resumed; longer: more memory
    # checkpoint: the model directory's chat_template.jinja, for models with another one than K2-Instruct's.
    # 0.2 ms a request more, and one at a time; its calls are still read in K2's form.
    chat_template: Literal["built-in", "checkpoint"] = "built-in"
    # Special tokens' names in what clients send become these tokens, as the reference tokenizer has it: the
    # same ids for the same bytes, and any user can forge turns of the conversation.
    specials_in_text: bool = False
    # Memory of the request log, at most. A request counts with every token that it may still get; more: more
    # requests with long answers at a time.
    log_bytes: Count = 2**30
    # File of hashed API keys (`python -m k2dist.service.new_key` adds to it), on the machines where
    # coordinator and gateway run; read again when it changes. None: whoever reaches the servers may do all.
    api_keys: str | None = None
    tls: TlsConfig = TlsConfig()


class ObserveConfig(Message, frozen=True, kw_only=True):
    """What the cluster's processes say of themselves, besides `/metrics`. Never prompts, answers or keys."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"  # lower: less to search, less to find
    log_format: Literal["text", "json"] = "text"  # json: for whoever gathers the logs of many machines
    # Of an OpenTelemetry collector that takes OTLP over HTTP, such as http://127.0.0.1:4318: spans of
    # requests go there. None: none are made.
    otlp_endpoint: str | None = None
    # Of requests that come without a traceparent, so many are traced; less: less to send and to keep.
    trace_share: Annotated[float, Meta(ge=0, le=1)] = 1.0


class ClusterConfig(Message, frozen=True, kw_only=True):
    """See the module. `name` is also the namespace of its actors in Ray."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
    parallel: ParallelConfig
    # Model directory, unless the command line names one; relative to where it is run.
    model: str | None = None
    # auto: the fastest set this machine has; native: C++ for CPUs; reference: plain torch.
    kernels: Literal["auto", "native", "triton", "reference"] = "auto"
    # Of the residual stream; float32: slow, for comparisons.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    exchange: ExchangeConfig = ExchangeConfig()
    ranks: RanksConfig = RanksConfig()
    nodes: NodesConfig = NodesConfig()
    network: NetworkConfig = NetworkConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    ray: RayConfig = RayConfig()
    service: ServiceConfig = ServiceConfig()
    observe: ObserveConfig = ObserveConfig()

    @property
    def capacity_factor(self) -> float | None:
        """`exchange.capacity_factor`, decided."""
        given = self.exchange.capacity_factor
        if given == "auto":
            is_framed = self.ranks.rank_gpus > 0 and self.parallel.world_size <= MOST_FRAMED_RANKS
            return GPU_CAPACITY_FACTOR if is_framed else None
        return given


def faults_between(config: ClusterConfig) -> Iterator[str]:
    """What no single field can be blamed for, or no type can express: path=value, why, remedy."""
    page_tokens = config.cache.page_tokens
    if page_tokens & (page_tokens - 1):
        yield f"cache.page_tokens={page_tokens}: use a power of two, such as {1 << page_tokens.bit_length()}"
    scheduler, deadlines = config.scheduler, config.deadlines
    if scheduler.step_tokens < scheduler.max_running:
        yield (
            f"scheduler.step_tokens={scheduler.step_tokens}: every running sequence may need a row in each "
            f"step; use at least max_running={scheduler.max_running}, or lower that"
        )
    if scheduler.chunk_tokens > scheduler.step_tokens:
        yield (
            f"scheduler.chunk_tokens={scheduler.chunk_tokens}: a chunk has to fit into a step; use at most "
            f"step_tokens={scheduler.step_tokens}"
        )
    if deadlines.lease_s < 3 * deadlines.lease_beat_s:
        yield (
            f"deadlines.lease_s={deadlines.lease_s:g}: one late beat would end the cluster; use at least "
            f"{3 * deadlines.lease_beat_s:g}, three times lease_beat_s"
        )
    for name, address in listen_addresses(config.service):
        if split_address(address) is None:
            yield (
                f"service.{name}={address!r}: use host:port with a port from 0 to {MAX_PORT}, such as "
                f"{'127.0.0.1:50051' if name == 'grpc' else '127.0.0.1:8000'}"
            )
    yield from _tls_faults(config.service.tls)
    if config.exchange.split_tokens is not None and config.ranks.rank_gpus > 0 and config.parallel.tp > 1:
        yield (
            f"exchange.split_tokens={config.exchange.split_tokens}: on GPUs a lane's group and the "
            f"world's would work at once, and two NCCL groups may wait for each other; use tp=1, or null"
        )
    world_size, num_nodes = config.parallel.world_size, config.nodes.num_nodes
    if num_nodes is not None and world_size % num_nodes:
        yield (
            f"nodes.num_nodes={num_nodes}: {world_size} ranks (lanes x tp + expert_only_ranks) do not spread "
            f"evenly; use a divisor of {world_size}, or other lanes"
        )
    endpoint = config.observe.otlp_endpoint
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        yield f"observe.otlp_endpoint={endpoint!r}: use a URL, such as http://127.0.0.1:4318"
    if not config.network.address:
        yield "network.address='': use an address of this machine, such as 127.0.0.1, or 'node'"


def _tls_faults(tls: TlsConfig) -> Iterator[str]:
    if (tls.cert is None) is not (tls.key is None):
        missing = "cert" if tls.cert is None else "key"
        yield f"service.tls.{missing}: missing; a certificate and its key go together"
    if tls.cert is None and any((tls.client_ca, tls.ca, tls.name)):
        yield "service.tls.cert: missing; without it there is no TLS, and the other fields say nothing"
    if tls.cert is not None and tls.ca is None:
        yield (
            "service.tls.ca: missing; the gateway knows the coordinator by it: the CA that signed cert, "
            "cert itself if it is self-signed, or 'system'"
        )


def listen_addresses(service: ServiceConfig) -> Iterator[tuple[str, str]]:
    """Field and address of each server."""
    yield "grpc", service.grpc
    if service.http is not None:
        yield "http", service.http


def exposures(service: ServiceConfig) -> Iterator[str]:
    """Servers that others than this machine's users could reach, and that ask for no keys."""
    if service.api_keys is not None:
        return
    for name, address in listen_addresses(service):
        parts = split_address(address)
        if parts is not None and not _is_loopback(parts[0]):
            yield (
                f"service.{name}={address!r}: it would serve, without keys, whoever reaches it; name a file "
                "of keys as service.api_keys, listen on 127.0.0.1, or say --insecure where the network "
                "itself keeps others out"
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def split_address(address: str) -> tuple[str, int] | None:
    """("127.0.0.1", 50051) of "127.0.0.1:50051", ("::1", 1) of "[::1]:1"; None if it is not host:port."""
    host, _, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if not host or (":" in host and not is_bracketed):
        return None
    if not port.isascii() or not port.isdigit() or int(port) > MAX_PORT:
        return None
    return host[1:-1] if is_bracketed else host, int(port)
