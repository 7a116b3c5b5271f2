"""What is found wrong before a process is started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from msgspec.structs import replace

from k2dist.cli.prepare import check_here, check_port, prepare_world
from k2dist.config.cluster import ClusterConfig, ParallelConfig, TlsConfig
from k2dist.demo import MODEL_DIR
from k2dist.errors import CapacityError, CheckpointError, ConfigError, UsageError

CONFIG = ClusterConfig(name="a", parallel=ParallelConfig(lanes=1, tp=2))


def test_the_command_line_wins_over_the_config(tiny_model_dir: Path) -> None:
    world = prepare_world(CONFIG, tiny_model_dir, "127.0.0.1:0", "127.0.0.1:0")
    assert world.config.service.grpc == "127.0.0.1:0"
    assert world.model_dir == str(tiny_model_dir)


def test_where_nobody_names_a_model_it_is_the_demos() -> None:
    assert prepare_world(CONFIG, None).model_dir == str(MODEL_DIR)
    elsewhere = replace(CONFIG, model="nosuch")
    with pytest.raises(CheckpointError, match="nosuch"):
        prepare_world(elsewhere, None)


def test_an_address_that_is_none_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"service\.grpc='nowhere'"):
        prepare_world(CONFIG, tiny_model_dir, "nowhere")
    with pytest.raises(ConfigError, match=r"service\.http='8000'.*such as 127\.0\.0\.1:8000"):
        prepare_world(CONFIG, tiny_model_dir, http="8000")


@pytest.mark.parametrize("address", ["0.0.0.0:8000", "[::]:8000", "10.1.2.3:8000", "example.org:8000"])
def test_without_keys_it_listens_to_this_machine_unless_told_otherwise(
    tiny_model_dir: Path, address: str
) -> None:
    with pytest.raises(ConfigError, match=r"service\.http=.*without keys.*--insecure"):
        prepare_world(CONFIG, tiny_model_dir, http=address)
    with pytest.raises(ConfigError, match=r"service\.grpc=.*without keys.*--insecure"):
        prepare_world(CONFIG, tiny_model_dir, address)
    world = prepare_world(CONFIG, tiny_model_dir, http=address, is_insecure=True)
    assert world.config.service.http == address


def test_with_keys_it_may_listen_to_all_and_its_files_are_looked_at_first(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    guarded = replace(CONFIG, service=replace(CONFIG.service, api_keys=str(keys), http=None))
    address = "0.0.0.0:0"
    assert prepare_world(guarded, tiny_model_dir, address).config.service.grpc == address
    with pytest.raises(ConfigError, match=r"service\.api_keys='.*keys\.yaml': cannot be read"):
        check_here(guarded.service)
    keys.write_text("[]")
    check_here(replace(guarded.service, grpc="127.0.0.1:0"))
    tls = TlsConfig(cert=str(tmp_path / "cert.pem"), key="k", ca="c")
    secured = replace(guarded, service=replace(guarded.service, tls=tls))
    with pytest.raises(ConfigError, match=r"service\.tls\.cert='.*cert\.pem': cannot be read"):
        check_here(secured.service)


@pytest.mark.parametrize("address", ["127.0.0.2:8000", "[::1]:8000", "localhost:8000"])
def test_loopback_needs_no_keys(tiny_model_dir: Path, address: str) -> None:
    world = prepare_world(CONFIG, tiny_model_dir, address, address)
    assert (world.config.service.grpc, world.config.service.http) == (address, address)


@pytest.mark.parametrize("is_cut", [True, False])
def test_a_file_that_is_cut_or_missing_is_found_by_headers(
    tiny_model_dir: Path, tmp_path: Path, is_cut: bool
) -> None:
    for path in tiny_model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    if is_cut:
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        prepare_world(CONFIG, tmp_path)


def test_a_layout_that_cuts_a_head_is_bad_usage(tiny_model_dir: Path) -> None:
    config = replace(CONFIG, parallel=ParallelConfig(lanes=1, tp=3))
    with pytest.raises(UsageError, match="num_attention_heads 8 / 3 is not whole"):
        prepare_world(config, tiny_model_dir)


def test_only_a_listener_makes_a_port_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with socket.create_connection(server.getsockname()) as client:
            accepted, _ = server.accept()
            with pytest.raises(CapacityError, match=rf"service\.grpc={address}: cannot listen"):
                check_port(address)
            accepted.close()  # the server's side first: it stays in TIME_WAIT
            client.recv(1)
    check_port(address)


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(CapacityError, match=r"service\.grpc=203\.0\.113\.1:50051"):
        check_port("203.0.113.1:50051")
