"""The runbook speaks of what there is: files, commands, configuration fields, metrics."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest
import typer
import yaml

from k2dist.cli.app import app
from k2dist.config.cluster import ClusterConfig
from k2dist.config.load import load_cluster

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PAGES = (*sorted(DEPLOY.rglob("README.md")), DEPLOY / "SECURITY.md")
TEXTS = {path: path.read_text() for path in PAGES}


@pytest.fixture(params=TEXTS, ids=lambda path: str(path.relative_to(DEPLOY)))
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", TEXTS[page]):
        assert (page.parent / target).exists(), target


def test_anchors_are_headings(page: Path) -> None:
    text = TEXTS[page]
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_fields_are_the_configurations(page: Path) -> None:
    sections = {
        field.encode_name: field.type
        for field in msgspec.structs.fields(ClusterConfig)
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
    }
    for section, name in re.findall(r"`(\w+)\.(\w+)", TEXTS[page]):
        if section in sections:
            assert name in sections[section].__struct_fields__, f"{section}.{name}"


def test_commands_are_the_programs(page: Path) -> None:
    """Groups' too: `k2dist bench serve`."""
    commands = typer.main.get_command(app).commands
    for name, of_group in re.findall(r"(?:^|[`=\d] ?|m )k2dist (\w+)(?: +(\w+))?", TEXTS[page], flags=re.M):
        assert name in commands, name
        assert of_group in getattr(commands[name], "commands", {of_group}), f"{name} {of_group}"


def test_the_job_sends_the_wheel_that_is_built() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wheel,) = yaml.safe_load((DEPLOY / "job/runtime_env.yaml").read_text())["pip"]
    assert wheel.startswith("${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/k2dist-" + project["version"] + "-cp311-")


def test_the_jobs_configuration_loads() -> None:
    assert load_cluster(DEPLOY / "job/cluster.yaml").name == "job"


def test_every_overlay_and_component_is_told(page: Path) -> None:
    if page.parent.name != "kuberay":
        return
    for kind in ("overlays", "components"):
        for path in (DEPLOY / "kuberay" / kind).iterdir():
            assert f"`{path.name}`" in TEXTS[page], path.name


def test_every_alert_has_its_section() -> None:
    rules = sorted((DEPLOY / "prometheus").glob("*.y*ml"))
    assert rules
    headings = re.findall(r"^### (alert-\w+)", TEXTS[DEPLOY / "README.md"], flags=re.M)
    groups = [group for path in rules for group in yaml.safe_load(path.read_text()).get("groups", ())]
    alerts = {f"alert-{rule['alert']}" for group in groups for rule in group["rules"] if "alert" in rule}
    assert set(headings) == alerts
