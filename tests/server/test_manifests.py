"""The manifests of docs/serving.md name ports, paths, flags and arguments that there are."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from llama.__main__ import app
from llama.options import MODEL
from llama.server.settings import SERVER

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
MANIFESTS = {one["kind"]: one for block in BLOCKS for one in yaml.safe_load_all(block)}
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
SERVER_CONTAINER = POD["containers"][0]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def flags(arguments: list[str]) -> dict[str, str]:
    pairs = [argument.removeprefix("--").split("=") for argument in arguments if argument.startswith("--")]
    return {name.replace("-", "_"): value for name, value in pairs}


def serve_config() -> dict[str, Any]:
    [application] = yaml.safe_load(MANIFESTS["RayService"]["spec"]["serveConfigV2"])["applications"]
    return application


def test_there_is_a_deployment_with_a_service_and_one_for_kuberay():
    assert sorted(MANIFESTS) == ["Deployment", "RayService", "Service"]


def test_the_container_runs_a_command_with_flags_that_it_has():
    command = typer.main.get_command(app).commands[SERVER_CONTAINER["args"][0]]
    given = flags(SERVER_CONTAINER["args"])
    assert given.keys() <= {parameter.name for parameter in command.params}
    assert given["port"] == str(SERVER_CONTAINER["ports"][0]["containerPort"])
    assert [one["name"] for one in SERVER_CONTAINER["env"]] == ["LLAMA_API_KEY"]


def test_probes_ask_what_answers_without_a_key():
    from llama.server.run import PUBLIC

    for name in PROBES:
        probe = SERVER_CONTAINER[name]
        asked = probe.get("httpGet") or probe["tcpSocket"]
        assert asked["port"] == SERVER_CONTAINER["ports"][0]["name"]
        assert asked.get("path", "/health") in PUBLIC


def test_a_pod_has_time_to_drain():
    stopping = SERVER_CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    drain = int(flags(SERVER_CONTAINER["args"])["shutdown_timeout"])
    assert POD["terminationGracePeriodSeconds"] > int(stopping[1]) + drain
    worker = MANIFESTS["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    assert worker["terminationGracePeriodSeconds"] > serve_config()["args"]["shutdown_timeout"]


def test_the_service_finds_the_pods():
    service = MANIFESTS["Service"]["spec"]
    assert service["selector"] == MANIFESTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert service["ports"][0]["targetPort"] == SERVER_CONTAINER["ports"][0]["name"]
    assert flags(SERVER_CONTAINER["args"])["allowed_hosts"] == MANIFESTS["Service"]["metadata"]["name"]


def test_the_application_of_kuberay_takes_its_arguments():
    application = serve_config()
    options = {option.name: option for option in (*MODEL, *SERVER)}
    given = application["args"].keys() - {"model", "replicas", "threads", "gpus"}
    assert given <= options.keys()
    module, _, name = application["import_path"].partition(":")
    assert find_spec(module) is not None
    assert name == "application"


def test_a_replica_of_kuberay_fits_on_a_worker():
    [group] = MANIFESTS["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    threads, replicas = serve_config()["args"]["threads"], serve_config()["args"]["replicas"]
    assert int(container["resources"]["limits"]["cpu"]) // threads * group["replicas"] >= replicas


def test_an_argument_that_there_is_not_is_refused_by_its_name():
    pytest.importorskip("ray")
    from llama.server.application import application

    with pytest.raises(ValueError, match=r"^threds, typo: no such argument; there are adapter, .*threads"):
        application({"typo": 1, "threds": 2})
    with pytest.raises(ValueError, match="admin_key"):
        application({"admin_key": "secret"})
    assert application({**serve_config()["args"]})
