"""The KubeRay manifests: rendered by kubectl, legal, of one mind with the configuration and the program."""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from k2dist.cli.app import app
from k2dist.config.cluster import exposures
from k2dist.config.load import load_cluster, parse_cluster
from tests.deploy.loading import load_script

ROOT = Path(__file__).resolve().parents[2]
CRDS = ROOT.parent / "shared" / "k8s"
MANIFESTS = load_script(ROOT / "deploy/kuberay/manifests.py")
RENDERED, SCHEMAS = sys.modules["rendered"], sys.modules["schemas"]  # beside it, and imported by it
TWO_HOSTS = load_script(ROOT / "deploy/two_hosts.py")
OVERLAYS = sorted(path.name for path in RENDERED.OVERLAYS.iterdir())
SERVED_BY = {"h200-2x8-job": "head"}  # the others have a service pod
LIKE = {
    "cpu-demo": "cpu-2x2.yaml",
    "h200-2x8": "h200-2x8.yaml",
    "h200-2x8-job": "h200-2x8.yaml",
    "h200-4x8-rdma": "h200-4x8.yaml",
}

Objects = tuple[dict[str, Any], ...]


@pytest.fixture(scope="module")
def rendered() -> dict[str, Objects]:
    return {overlay: RENDERED.read(RENDERED.render(overlay)) for overlay in OVERLAYS}


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def objects(rendered: dict[str, Objects], overlay: str) -> Objects:
    return rendered[overlay]


def of_kind(objects: Objects, kind: str) -> Iterator[dict[str, Any]]:
    return (one for one in objects if one["kind"] == kind)


def parts(objects: Objects) -> dict[str, Any]:
    return {group.part: group for group in RENDERED.pod_groups(objects)}


# -- legal ---------------------------------------------------------------------------------------------------


def test_what_kubernetes_knows_is_legal(objects: Objects) -> None:
    assert list(SCHEMAS.faults(objects)) == []


@pytest.mark.skipif(not CRDS.exists(), reason="KubeRay's definitions are not beside this checkout")
def test_what_kuberay_knows_is_legal(objects: Objects) -> None:
    assert list(SCHEMAS.ray_faults(objects, CRDS)) == []


@pytest.mark.skipif(not CRDS.exists(), reason="KubeRay's definitions are not beside this checkout")
def test_fields_that_nobody_knows_are_faults(rendered: dict[str, Objects]) -> None:
    """At any depth: Kubernetes would drop them without a word."""
    objects = copy.deepcopy(rendered["cpu-demo"])
    RENDERED.cluster_spec(objects)["authOptions"]["kind"] = "token"
    group = RENDERED.cluster_spec(objects)["workerGroupSpecs"][1]
    group["template"]["spec"]["containers"][0]["startProbe"] = {}
    found = "\n".join([*SCHEMAS.faults(objects), *SCHEMAS.ray_faults(objects, CRDS)])
    assert "spec.authOptions: Additional properties are not allowed ('kind' was unexpected)" in found
    assert "spec.workerGroupSpecs.1.template.spec.containers.0" in found
    assert "Pod ranks: spec.containers.0: Additional properties" in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"port": 8000}, "spec.endpoints.0.port: 8000 is not of type 'string'"),
        ({"scrapeTimout": "9s"}, "('scrapeTimout' was unexpected)"),
        ({"interval": "15"}, "spec.endpoints.0.interval: '15' does not match"),
        ({"authorization": {"credentials": {"name": "k2dist-monitor"}}}, "'key' is a required property"),
    ],
)
def test_a_monitor_that_would_not_scrape_is_a_fault(
    rendered: dict[str, Objects], change: dict[str, Any], message: str
) -> None:
    objects = copy.deepcopy(rendered["h200-2x8"])
    (monitor,) = of_kind(objects, "ServiceMonitor")
    monitor["spec"]["endpoints"][0] |= change
    (fault,) = SCHEMAS.faults(objects)
    assert message in fault


@pytest.mark.parametrize(
    ("component", "label"), [("kueue", "kueue.x-k8s.io/queue-name"), ("volcano", "volcano.sh/queue-name")]
)
@pytest.mark.parametrize("name", ["h200-2x8", "h200-2x8-job"])
def test_all_pods_or_none_is_a_component(tmp_path: Path, component: str, label: str, name: str) -> None:
    objects = with_component(tmp_path, name, component)
    (labelled,) = (one for one in objects if one["kind"] in RENDERED.CLUSTER_KINDS)
    assert labelled["metadata"]["labels"][label] == "k2dist"


def test_a_secret_can_be_mounted(tmp_path: Path) -> None:
    """Keys and certificates, for the one pod that asks for them."""
    objects = with_component(tmp_path, "cpu-demo", "keys")
    assert list(SCHEMAS.faults(objects)) == []
    mounts = {
        part: [mount["mountPath"] for mount in group.container["volumeMounts"]]
        for part, group in parts(objects).items()
    }
    assert [part for part, paths in mounts.items() if "/etc/k2dist-secrets" in paths] == ["service"]


def with_component(directory: Path, overlay: str, component: str) -> Objects:
    there = os.path.relpath(ROOT / "deploy/kuberay", directory.resolve())
    made = {"resources": [f"{there}/overlays/{overlay}"], "components": [f"{there}/components/{component}"]}
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(made))
    objects: Objects = RENDERED.read(RENDERED.render(str(directory)))
    return objects


# -- said ----------------------------------------------------------------------------------------------------


def test_the_summary_says_what_has_to_be_made_first(rendered: dict[str, Objects]) -> None:
    """Every secret that some pod or scraper looks for, and its keys; neither is in the manifests."""
    needed = {name: list(MANIFESTS.needs(objects)) for name, objects in rendered.items()}
    assert needed["cpu-demo"] == ["secret k2dist-redis: password"]
    assert needed["h200-2x8"] == needed["h200-4x8-rdma"]
    assert needed["h200-2x8"] == [
        "secret k2dist-monitor: key",
        "secret k2dist-redis: password",
        "secret k2dist-secrets: keys.yaml",
        "the checkpoint, in the volume of a claim, as /models/Kimi-K2-Instruct",
    ]
    readme = (ROOT / "deploy/kuberay/README.md").read_text()
    for line in needed["h200-2x8"][:3]:
        assert f"create secret generic {line.split(':')[0].removeprefix('secret ')} " in readme


def test_the_summarys_arithmetic_is_the_plans(rendered: dict[str, Objects]) -> None:
    """Whoever runs the command that it ends with sees the same figures."""
    said = list(MANIFESTS.summary("h200-2x8", rendered["h200-2x8"]))
    assert "  a rank's memory: 99.3 GB and 50.4 GB of cache, of 150.0 GB: it fits" in said
    command = said[-1].partition("k2dist plan ")[2].split()
    path = ROOT / command.pop(0)
    shown = CliRunner().invoke(app, ["plan", str(path), *command])
    assert shown.exit_code == 0, shown.output
    assert re.search(r"together +99\.31 GB", shown.output)
    assert "50.37 GB a rank" in shown.output


# -- of one mind with the program ----------------------------------------------------------------------------


def test_every_command_is_one_that_k2dist_has(objects: Objects) -> None:
    """Parsed by the command line itself, down to the last option, and not run."""
    command = typer.main.get_command(app)
    found = list(RENDERED.commands(objects))
    assert {arguments[0] for arguments in found} == {"serve", "stop"}
    for name, *arguments in found:
        with typer.Context(command) as context:
            command.commands[name].make_context(name, list(arguments), parent=context)


def test_a_command_that_k2dist_does_not_have_is_found() -> None:
    command = typer.main.get_command(app)
    with typer.Context(command) as context, pytest.raises(Exception, match="--inscure"):
        command.commands["serve"].make_context("serve", ["--inscure"], parent=context)


def test_the_configuration_loads_and_fits(objects: Objects) -> None:
    config = RENDERED.cluster_config(objects)
    assert MANIFESTS.memory_plan(config).ranks


def test_the_configuration_is_the_one_of_bare_machines(objects: Objects, overlay: str) -> None:
    """Up to where it listens and who may call, where the weights are, how much is cached, and patience."""
    there = load_cluster(ROOT / "cluster_configs" / LIKE[overlay])
    here = RENDERED.cluster_config(objects)
    for section in ("parallel", "exchange", "ranks", "nodes", "kernels", "dtype"):
        assert getattr(here, section) == getattr(there, section), section


def test_the_mounted_configuration_is_the_one_that_serves(objects: Objects, overlay: str) -> None:
    (serve,) = (arguments for arguments in RENDERED.commands(objects) if arguments[0] == "serve")
    path = Path(serve[serve.index("--config") + 1])
    group = parts(objects)[SERVED_BY.get(overlay, "service")]
    mounts = {mount["mountPath"]: mount["name"] for mount in group.container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in group.template["spec"]["volumes"]}
    (config,) = of_kind(objects, "ConfigMap")
    assert volumes[mounts[str(path.parent)]]["configMap"]["name"] == config["metadata"]["name"]
    assert path.name in config["data"]


def test_whoever_ends_the_cluster_knows_its_name(objects: Objects) -> None:
    name = RENDERED.cluster_config(objects).name
    stops = [arguments for arguments in RENDERED.commands(objects) if arguments[0] == "stop"]
    assert len(stops) == 2
    assert {tuple(arguments) for arguments in stops} == {("stop", "--name", name)}


def test_pods_have_what_ranks_take(objects: Objects) -> None:
    config, ranks = RENDERED.cluster_config(objects), parts(objects)["ranks"]
    assert ranks.replicas == config.nodes.num_nodes
    each = config.parallel.world_size // ranks.replicas
    cpus = int(ranks.start.get("num-cpus", ranks.resources["cpu"]))
    assert each * config.ranks.rank_cpus <= cpus <= int(ranks.resources["cpu"])
    assert each * config.ranks.rank_gpus == int(ranks.resources.get("nvidia.com/gpu", 0))


def test_only_ranks_have_anything_for_ranks(objects: Objects) -> None:
    for part in {"head", "service"} & set(parts(objects)):
        assert parts(objects)[part].start["num-cpus"] == "0"
        assert parts(objects)[part].start["num-gpus"] == "0"


def test_weights_are_where_the_configuration_says(objects: Objects, overlay: str) -> None:
    """Read-only, for ranks and for whoever reads headers and vocabulary; the demo's are in the image."""
    model = RENDERED.cluster_config(objects).model
    for part in ("ranks", SERVED_BY.get(overlay, "service")):
        mounts = {
            mount["mountPath"]: mount.get("readOnly")
            for mount in parts(objects)[part].container["volumeMounts"]
        }
        assert (mounts.get("/models") is True) == (model is not None)
        assert model is None or model.startswith("/models/")


def test_whoever_is_let_in_without_a_key_is_let_in_by_name(objects: Objects, overlay: str) -> None:
    """Only the demo says --insecure; the others would not start if their keys were not named."""
    (serve,) = (arguments for arguments in RENDERED.commands(objects) if arguments[0] == "serve")
    is_exposed = bool(list(exposures(RENDERED.cluster_config(objects).service)))
    assert is_exposed == ("--insecure" in serve) == (overlay == "cpu-demo")


def test_keys_are_a_secret_where_the_configuration_looks(objects: Objects, overlay: str) -> None:
    """In the pod that serves and in no other; Prometheus has one of its own."""
    path = RENDERED.cluster_config(objects).service.api_keys
    served_by = SERVED_BY.get(overlay, "service")
    for part, group in parts(objects).items():
        secrets = secret_mounts(group)
        wanted = part == served_by and path is not None
        assert secrets == ({str(Path(path).parent): "k2dist-secrets"} if wanted and path else {}), part
    for monitor in of_kind(objects, "ServiceMonitor"):
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["authorization"]["credentials"] == {"name": "k2dist-monitor", "key": "key"}


def secret_mounts(group: Any) -> dict[str, str]:
    """Directory: secret."""
    volumes = {
        volume["name"]: volume["secret"]["secretName"]
        for volume in group.template["spec"].get("volumes", ())
        if "secret" in volume
    }
    mounts = [mount for mount in group.container.get("volumeMounts", ()) if mount["name"] in volumes]
    assert all("subPath" not in mount and mount["readOnly"] for mount in mounts)  # a subPath is never updated
    return {mount["mountPath"]: volumes[mount["name"]] for mount in mounts}


def test_certificates_are_a_component(tmp_path: Path) -> None:
    """With the line of configuration that it asks for, which has to be valid and lead to its files."""
    objects = with_component(tmp_path, "h200-2x8", "tls")
    assert list(SCHEMAS.faults(objects)) == []
    service = parts(objects)["service"]
    probes = [service.container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert [probe["scheme"] for probe in probes] == ["HTTPS"] * 3
    (monitor,) = of_kind(objects, "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]

    comment = (ROOT / "deploy/kuberay/components/tls/kustomization.yaml").read_text()
    (line,) = re.findall(r"^#   (tls: \{.*\})$", comment, flags=re.M)
    text = (RENDERED.OVERLAYS / "h200-2x8/cluster.yaml").read_text()
    tls = parse_cluster(text.replace("service:\n", f"service:\n  {line}\n"), "with tls").service.tls
    directory, secret = next(item for item in secret_mounts(service).items() if "tls" in item[1])
    assert {str(Path(path).parent) for path in (tls.cert, tls.key, tls.ca) if path} == {directory}
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"]["serverName"] == tls.name
    assert endpoint["tlsConfig"]["ca"]["secret"] == {"name": secret, "key": Path(tls.ca or "").name}


def test_ports_are_the_configurations(objects: Objects) -> None:
    service = RENDERED.cluster_config(objects).service
    wanted = {"http": int(service.http.rpartition(":")[2]), "grpc": int(service.grpc.rpartition(":")[2])}
    (found,) = (one for one in of_kind(objects, "Service") if one["metadata"]["name"] == "k2dist")
    assert {port["name"]: port["targetPort"] for port in found["spec"]["ports"]} == wanted
    assert all(address.startswith("0.0.0.0:") for address in (service.http, service.grpc))


# -- times ---------------------------------------------------------------------------------------------------


def test_the_startup_probe_outlasts_the_start(objects: Objects, overlay: str) -> None:
    """And does not wait twice as long for what has gone wrong."""
    config = RENDERED.cluster_config(objects)
    assert MANIFESTS.machine_bytes(config) / MANIFESTS.DISK_BYTES_PER_S < config.deadlines.load_s
    if overlay in SERVED_BY:
        return  # a job has no probe of ours
    probe = parts(objects)["service"].container["startupProbe"]
    window_s = probe["periodSeconds"] * probe["failureThreshold"]
    assert MANIFESTS.start_s(config) <= window_s <= 2 * MANIFESTS.start_s(config)


def test_the_plan_expects_no_more(rendered: dict[str, Objects]) -> None:
    """`k2dist plan` counts more than bytes over the disk's speed."""
    rate = ("--disk-gb-s", str(MANIFESTS.DISK_BYTES_PER_S / 1e9))
    for overlay in ("h200-2x8", "h200-4x8-rdma"):
        limits = RENDERED.cluster_config(rendered[overlay]).deadlines
        path = ROOT / "cluster_configs" / LIKE[overlay]  # the same layout, and it names the device
        asked = CliRunner().invoke(app, ["plan", str(path), *rate, "--model", "kimi-k2-instruct", "--json"])
        assert asked.exit_code == 0, asked.output
        plan = json.loads(asked.stdout)
        assert plan["load_s"] < limits.load_s
        probe = parts(rendered[overlay])["service"].container["startupProbe"]
        assert limits.nodes_s + plan["ready_s"] <= probe["periodSeconds"] * probe["failureThreshold"]


def test_pods_outlive_the_drain(objects: Objects) -> None:
    limits = RENDERED.cluster_config(objects).deadlines
    drain_s = limits.drain_s + 2 * limits.stop_s + limits.call_s
    for part in {"head", "service", "ranks"} & set(parts(objects)):
        group = parts(objects)[part]
        before = re.search(r"sleep (\d+)", list(group.scripts)[1])
        before_s = int(before.group(1)) if before else 0
        assert group.template["spec"]["terminationGracePeriodSeconds"] >= before_s + drain_s + 10


def test_a_lost_machine_is_noticed_as_in_the_rehearsal_of_two_hosts(objects: Objects) -> None:
    """By Ray's head, before a rank's peers give up on it: else the error names the rank only."""
    environment = {one["name"]: one["value"] for one in parts(objects)["head"].container["env"]}
    assert environment == TWO_HOSTS.NOTICE
    period_ms, timeout_ms, times = map(int, TWO_HOSTS.NOTICE.values())
    assert times * (period_ms + timeout_ms) / 1e3 < RENDERED.cluster_config(objects).deadlines.step_s


def test_probes_ask_what_answers(rendered: dict[str, Objects]) -> None:
    """The gateway itself waits 5 s for the coordinator."""
    container = parts(rendered["h200-2x8"])["service"].container
    asked = {
        name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")
    }
    assert asked == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert all(container[f"{name}Probe"]["timeoutSeconds"] > 5 for name in asked)


def test_a_cluster_may_end_by_itself_before_it_is_killed(rendered: dict[str, Objects]) -> None:
    """Its own deadline names the rank that did not arrive; the kubelet's names nobody."""
    for overlay in set(OVERLAYS) - set(SERVED_BY):
        probe = parts(rendered[overlay])["service"].container["livenessProbe"]
        step_s = RENDERED.cluster_config(rendered[overlay]).deadlines.step_s
        assert probe["periodSeconds"] * probe["failureThreshold"] > step_s


# -- who belongs together ------------------------------------------------------------------------------------


def test_selectors_find_their_pods(objects: Objects, overlay: str) -> None:
    labels = {
        part: group.template["metadata"]["labels"]
        for part, group in parts(objects).items()
        if part != "submitter"
    }
    served_by = SERVED_BY.get(overlay, "service")
    (service,) = (one for one in of_kind(objects, "Service") if one["metadata"]["name"] == "k2dist")
    assert chosen({"matchLabels": service["spec"]["selector"]}, labels) == {served_by}
    (budget,) = of_kind(objects, "PodDisruptionBudget")
    assert chosen(budget["spec"]["selector"], labels) == {served_by, "ranks"}
    assert budget["spec"]["minAvailable"] == 1 + parts(objects)["ranks"].replicas
    policies = {one["metadata"]["name"]: one for one in of_kind(objects, "NetworkPolicy")}
    assert chosen(policies["k2dist"]["spec"]["podSelector"], labels) == set(labels) - {"redis"}
    for monitor in of_kind(objects, "ServiceMonitor"):
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


def chosen(selector: dict[str, Any], labels: dict[str, dict[str, str]]) -> set[str]:
    wanted = {key: [value] for key, value in selector.get("matchLabels", {}).items()}
    wanted |= {one["key"]: one["values"] for one in selector.get("matchExpressions", ())}
    return {
        part
        for part, found in labels.items()
        if all(found.get(key) in values for key, values in wanted.items())
    }


# -- what is allowed -----------------------------------------------------------------------------------------


def test_nothing_is_more_than_it_has_to_be(objects: Objects, overlay: str) -> None:
    has_rdma = "rdma" in overlay
    for part, group in parts(objects).items():
        spec, container = group.template["spec"], group.container
        assert spec["automountServiceAccountToken"] is False, part
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, part
        capabilities = container["securityContext"]["capabilities"]
        assert capabilities["drop"] == ["ALL"], part
        is_lowered = has_rdma and part == "ranks"
        assert capabilities.get("add", []) == (["IPC_LOCK"] if is_lowered else []), part
        user = container["securityContext"].get("runAsUser", spec["securityContext"]["runAsUser"])
        assert (user == 0) == is_lowered, part
    (namespace,) = of_kind(objects, "Namespace")
    level = namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert level == ("privileged" if has_rdma else "restricted")


def test_only_the_rdma_overlay_asks_for_adapters(objects: Objects, overlay: str) -> None:
    asked = [name for name in parts(objects)["ranks"].resources if name.startswith("rdma/")]
    assert bool(asked) == ("rdma" in overlay)


def test_ray_asks_for_its_token_and_remembers(objects: Objects, overlay: str) -> None:
    spec = RENDERED.cluster_spec(objects)
    assert spec["authOptions"]["mode"] == "token"
    assert ("gcsFaultToleranceOptions" in spec) == (overlay not in SERVED_BY)
    for one in of_kind(objects, "Secret"):
        raise AssertionError(f"a secret in the manifests: {one['metadata']['name']}")


def test_shared_memory_is_memory_and_holds_the_object_store(objects: Objects) -> None:
    for part in {"head", "service", "ranks"} & set(parts(objects)):
        group = parts(objects)[part]
        (shm,) = (volume for volume in group.template["spec"]["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"
        gibibytes = int(shm["emptyDir"]["sizeLimit"].removesuffix("Gi"))
        assert int(group.start["object-store-memory"]) < gibibytes * 2**30


def test_versions_are_pinned_and_ours(objects: Objects) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group in parts(objects).values():
        name, _, tag = group.container["image"].partition(":")
        assert re.match(r"\d+\.\d+\.\d+", tag), group.container["image"]
        assert name != "k2dist" or tag.startswith(project["version"])
    pins = (ROOT / "deploy/docker/constraints.txt").read_text().splitlines()
    assert f"ray=={RENDERED.cluster_spec(objects)['rayVersion']}" in pins
