"""Cluster YAML: strict, every fault at once with path, value and remedy; the committed configs are right."""

import re
from pathlib import Path

import msgspec
import pytest

from k2dist.config.cluster import ClusterConfig, split_address
from k2dist.config.load import load_cluster, parse_cluster
from k2dist.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "cluster_configs").glob("*.yaml"))
LEAST = "name: a\nparallel: {lanes: 1, tp: 1}\n"


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_cluster(text, "x.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_committed_configs_are_strictly_right(path: Path) -> None:
    assert load_cluster(path).name == path.stem


def test_the_laptop_is_two_lanes_of_two_on_fewer_than_two_cores() -> None:
    config = load_cluster(REPOSITORY / "cluster_configs" / "laptop.yaml")
    assert (config.parallel.lanes, config.parallel.tp, config.parallel.world_size) == (2, 2, 4)
    assert config.parallel.world_size * config.ranks.rank_cpus < 2
    assert config.ray.object_store_bytes <= 100 * 2**20
    assert config.ranks.threads == 1


def test_the_demo_uses_the_committed_laptop_config() -> None:
    packaged = REPOSITORY / "k2dist" / "demo" / "laptop.yaml"
    assert packaged.read_text() == (REPOSITORY / "cluster_configs" / "laptop.yaml").read_text()


def test_what_is_not_given_has_the_default_of_its_type() -> None:
    config = parse_cluster(LEAST, "x.yaml")
    assert config == ClusterConfig(name="a", parallel=config.parallel)


def test_every_fault_is_reported_at_once_with_its_path() -> None:
    found = faults(
        """
name: Not A Name
parallel: {lanes: 0, tp: two, ep: 4}
paralel: {}
cache: 3
ranks: {rank_cpus: -1, placement: together}
deadlines: {step_s: '3'}
kernels: fast
"""
    )
    assert found == [
        "x.yaml: paralel: unknown field; did you mean parallel?",
        "x.yaml: name='Not A Name': expected `str` matching regex '^[a-z0-9][a-z0-9-]{0,39}$'",
        "x.yaml: parallel.ep: unknown field; known here: lanes, tp, expert_only_ranks, slots_per_rank",
        "x.yaml: parallel.lanes=0: expected `int` >= 1",
        "x.yaml: parallel.tp='two': expected `int`, got `str`",
        "x.yaml: kernels='fast': use auto or native or triton or reference",
        "x.yaml: cache=3: expected a section with fields such as page_tokens, num_pages, reuse_generated",
        "x.yaml: ranks.rank_cpus=-1: expected `float` > 0.0",
        "x.yaml: ranks.placement='together': use pack or spread or strict_pack or strict_spread",
        "x.yaml: deadlines.step_s='3': expected `float`, got `str`",
    ]


def test_missing_fields_are_named() -> None:
    assert faults("parallel: {tp: 2}") == [
        "x.yaml: name: missing; it has no default",
        "x.yaml: parallel.lanes: missing; it has no default",
    ]


@pytest.mark.parametrize(
    ("section", "start"),
    [
        ("cache: {page_tokens: 48}", "x.yaml: cache.page_tokens=48: use a power of two, such as 64"),
        ("scheduler: {step_tokens: 8, chunk_tokens: 8}", "x.yaml: scheduler.step_tokens=8: every running"),
        ("scheduler: {chunk_tokens: 4096}", "x.yaml: scheduler.chunk_tokens=4096: a chunk has to fit"),
        ("deadlines: {lease_s: 2}", "x.yaml: deadlines.lease_s=2: one late beat would end the cluster"),
        ("service: {grpc: localhost}", "x.yaml: service.grpc='localhost': use host:port"),
        ("service: {grpc: 'localhost:65536'}", "x.yaml: service.grpc='localhost:65536': use host:port"),
        ("service: {tls: {cert: c, ca: a}}", "x.yaml: service.tls.key: missing"),
        ("service: {tls: {key: k}}", "x.yaml: service.tls.cert: missing; a certificate and its key"),
        ("service: {tls: {client_ca: a}}", "x.yaml: service.tls.cert: missing; without it there is no TLS"),
        ("service: {tls: {cert: c, key: k}}", "x.yaml: service.tls.ca: missing; the gateway"),
        ("network: {address: ''}", "x.yaml: network.address='': use an address of this machine"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(section: str, start: str) -> None:
    (fault,) = faults(LEAST + section)
    assert fault.startswith(start)


def test_contradictions_are_reported_together_too() -> None:
    assert len(faults(LEAST + "cache: {page_tokens: 3}\nservice: {grpc: ''}\ndeadlines: {lease_s: 1}")) == 3


def test_a_key_given_twice_is_refused() -> None:
    (fault,) = faults("name: a\nname: b\nparallel: {lanes: 1, tp: 1}")
    assert "'name' is given twice" in fault
    assert "line 2" in fault


@pytest.mark.parametrize("text", ["", "- 1", "name: [", "3"])
def test_what_is_not_a_section_is_one_line(text: str) -> None:
    (fault,) = faults(text)
    assert fault.startswith("x.yaml: ")


def test_a_file_that_is_not_there_is_an_error_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nosuch\.yaml: cannot be read .*cluster_configs"):
        load_cluster(tmp_path / "nosuch.yaml")


def test_every_quantity_says_its_unit() -> None:
    """Numbers are counts (plural or a total), or end in their unit; a factor and a share have none."""
    units = ("_s", "_bytes", "_tokens", "_cpus", "_gpus", "_ranks", "_factor", "_share")
    counts = {"lanes", "tp", "threads", "num_pages", "max_running", "max_waiting", "num_cpus", "max_queued"}
    counts |= {"slots_per_rank", "num_nodes", "prefill_every"}

    def numbers(section: type[msgspec.Struct]) -> list[str]:
        names: list[str] = []
        for field in msgspec.structs.fields(section):
            if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
                names += numbers(field.type)
            elif "Literal" not in str(field.type) and re.search(r"\b(int|float)\b", str(field.type)):
                names.append(field.name)
        return names

    found = numbers(ClusterConfig)
    assert len(found) > 20
    assert [name for name in found if not name.endswith(units) and name not in counts] == []


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        ("[::1]:0", ("::1", 0)),
        ("host:65535", ("host", 65535)),
        ("::1:80", None),
        ("host", None),
        (":80", None),
        ("host:-1", None),
        ("host:65536", None),
        ("host:८", None),
    ],
)
def test_addresses_are_split_or_refused(address: str, parts: tuple[str, int] | None) -> None:
    assert split_address(address) == parts
