"""`k2dist doctor` in a Ray that goes on."""

from __future__ import annotations

import json
from pathlib import Path

from k2dist.cluster.ray_host import HostProcess
from tests.e2e.command import Command, actors_of, await_that, write_config


def test_every_node_of_a_ray_is_looked_at_and_what_it_lacks_is_an_error(
    ray_host: HostProcess, tmp_path: Path, tiny_model_dir: Path
) -> None:
    config = write_config(tmp_path, "large", parallel="{lanes: 2, tp: 2}", ranks="{rank_cpus: 1.5}")
    arguments = ("doctor", config, "--model", tiny_model_dir, "--json")
    with Command(*arguments, ray_address=ray_host.address) as command:
        assert command.wait() == 1, command.errors()
        report = json.loads(command.output())
    (node,) = report["facts"]["nodes"]
    assert node["node"] == report["facts"]["driver"]
    assert abs(node["clock"]["offset_s"]) < 0.5, "its clock is ours"
    assert node["model"]["num_bytes"] > 0
    (link,) = report["facts"]["links"]
    assert (link["nodes"], link["reason"]) == ([node["node"]] * 2, "")
    errors = [each for each in report["findings"] if each["level"] == "error"]
    assert [(each["check"], each["what"]) for each in errors] == [
        ("ray", f"4 ranks x 1.5 CPU, and its nodes have room for 1: {node['node']} 1")
    ]
    assert "fewer ranks" in errors[0]["remedy"]
    await_that(lambda: actors_of(ray_host.mark.pid, "Prober") == [], "a prober lives")
