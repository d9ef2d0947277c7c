"""What starts servers on many machines: files whose options `kvtrain serve` knows, and whose kinds a cluster knows."""

import ast
import importlib.util
from pathlib import Path

import pytest
import yaml

from kvtrain.cli import build_parser
from kvtrain.inference.server.options import add_engine_arguments
from kvtrain.parser import Parser

FOLDER = Path(__file__).resolve().parents[3] / "launch" / "serve"
RAY = yaml.safe_load((FOLDER / "ray.yaml").read_text())
DEPLOYMENT, SERVICE = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
INFERENCE = yaml.safe_load((FOLDER / "kserve.yaml").read_text())


def pods():
    return {"kubernetes": DEPLOYMENT["spec"]["template"]["spec"], "kserve": INFERENCE["spec"]["predictor"]}


def asked_by(pod):
    """What a container's command line comes to."""
    (container,) = pod["containers"]
    assert container["command"][:2] == ["kvtrain", "serve"]
    return build_parser("serve").parse_args([*container["command"][2:], *container["args"]])


def test_ray_s_file_names_a_function_and_options_that_there_are():
    (application,) = RAY["applications"]
    module, _, function = application["import_path"].partition(":")
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    parser = Parser("ray")
    add_engine_arguments(parser)
    options = {f"--{name.replace('_', '-')}={value}" for name, value in application["args"].items() if name != "model"}
    asked = parser.parse_args([application["args"]["model"], *options])
    (deployment,) = application["deployments"]
    assert deployment["autoscaling_config"]["target_ongoing_requests"] < asked.max_requests
    assert deployment["name"] == "kvtrain" and RAY["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize("name", pods())
def test_a_pod_serves_with_a_key_where_its_probes_ask(name):
    pod = pods()[name]
    (container,), asked = pod["containers"], asked_by(pod)
    (port,) = container["ports"]
    assert (asked.host, asked.port) == ("0.0.0.0", port["containerPort"])
    for probe in (container[kind] for kind in container if kind.endswith("Probe")):
        assert probe["httpGet"]["path"] == "/health" and probe["httpGet"]["port"] in (asked.port, port["name"])
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(Path(asked.api_key_file).parent), str(Path(asked.model).parent)} == mounts
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_a_pod_that_shuts_down_has_its_grace():
    asked = asked_by(pods()["kubernetes"])
    probe = DEPLOYMENT["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]
    assert DEPLOYMENT["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > asked.grace
    assert probe["periodSeconds"] * probe["failureThreshold"] > asked.grace
    predictor, served = INFERENCE["spec"]["predictor"], asked_by(pods()["kserve"])
    assert (predictor["containerConcurrency"], predictor["timeout"]) == (served.max_requests, served.timeout)


def test_the_service_finds_the_pods():
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"].items() <= labels.items()
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.roads
@pytest.mark.parametrize("manifest", [DEPLOYMENT, SERVICE], ids=lambda manifest: manifest["kind"])
def test_kubernetes_knows_every_field(manifest):
    validation = pytest.importorskip("kubernetes_validate", reason="needs pip install 'kvtrain[interop]'")
    validation.validate(manifest, validation.latest_version(), strict=True)
    manifest["spec"]["replica"] = 1
    with pytest.raises(validation.ValidationError):
        validation.validate(manifest, validation.latest_version(), strict=True)
    del manifest["spec"]["replica"]


def test_kserve_s_required_fields_are_there():
    """By its reference: a predictor of containers, whose first one has this name."""
    assert (INFERENCE["apiVersion"], INFERENCE["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert INFERENCE["metadata"]["name"]
    (container,) = INFERENCE["spec"]["predictor"]["containers"]
    assert container["name"] == "kserve-container" and container["image"]
    assert container["ports"][0]["protocol"] == "TCP"
