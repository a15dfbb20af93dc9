"""The Kubernetes manifests: KubeRay and Kubernetes know every field, and the cluster is closed and has the documented size."""

from __future__ import annotations

import copy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml
from kuberay import check_manifest
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
TREES = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}
CLUSTERS = [name for name, tree in TREES.items() if tree["apiVersion"].startswith("ray.io/")]


@pytest.mark.parametrize("name", TREES)
def test_manifest_is_of_the_real_schema(name):
    check_manifest(TREES[name])
    assert (ROOT / "cluster" / "kuberay" / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("spec.headGroupSpecs", {}, "Extra inputs are not permitted"),
        ("spec.authOptions.mode", "password", "Input should be 'disabled' or 'token'"),
        ("spec.headGroupSpec.rayStartParams.num-cpus", 2, "Input should be a valid string"),
        ("spec.headGroupSpec.template.spec.container", [], "not a field of V1PodSpec"),
        ("spec.headGroupSpec.template.spec.containers", None, "expected a list"),
        ("spec.headGroupSpec.template.spec.volumes", [{"emptyDir": {}}], "Field required"),
        ("spec.headGroupSpec.template.spec.securityContext.runAsUser", "root", "expected int"),
        ("metadata.nam", "x", "not a field of V1ObjectMeta"),
    ],
)
def test_wrong_field_or_value_is_a_fault(path, value, words):
    """Proves that the checks above can fail."""
    tree = copy.deepcopy(TREES["raycluster"])
    *parents, last = path.split(".")
    part = tree
    for key in parents:
        part = part[key]
    part[last] = value
    with pytest.raises(ValidationError, match=words):
        check_manifest(tree)


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_asks_for_the_token_and_runs_our_ray_without_root(name):
    spec = check_manifest(TREES[name])
    assert spec.auth_options.mode == "token"
    assert spec.ray_version == ray.__version__
    for group in (spec.head_group_spec, *spec.worker_group_specs):
        pod = group.template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts == {volume["name"] for volume in pod["volumes"]}
            assert container["resources"]["limits"] == container["resources"]["requests"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_has_four_gpus_and_none_at_its_head(name):
    spec = check_manifest(TREES[name])
    assert spec.head_group_spec.ray_start_params["num-gpus"] == "0"
    gpus = sum(
        group.replicas * int(container["resources"]["limits"]["nvidia.com/gpu"])
        for group in spec.worker_group_specs
        for container in group.template["spec"]["containers"]
    )
    assert gpus == 4


def test_dashboard_is_on_loopback_or_behind_the_network_policy():
    hosts = {name: check_manifest(TREES[name]).head_group_spec.ray_start_params["dashboard-host"] for name in CLUSTERS}
    assert hosts.pop("raycluster") == "127.0.0.1"
    assert set(hosts.values()) == {"0.0.0.0"}  # the operator must reach it
    peers, operator, clients = TREES["network"]["spec"]["ingress"]
    assert TREES["network"]["spec"]["policyTypes"] == ["Ingress"]
    assert peers["from"] == [{"podSelector": TREES["network"]["spec"]["podSelector"]}]
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert clients["ports"] == [{"protocol": "TCP", "port": 8000}]


def test_job_runs_a_script_and_a_config_that_are_there():
    entrypoint = TREES["rayjob"]["spec"]["entrypoint"]
    words = shlex.split(entrypoint.partition("&& ")[2])
    assert words[0] == "python"
    assert all((ROOT / word).is_file() for word in words if "/" in word)


def test_claim_is_the_one_that_all_pods_mount():
    for name in CLUSTERS:
        spec = check_manifest(TREES[name])
        for group in (spec.head_group_spec, *spec.worker_group_specs):
            claims = [
                volume["persistentVolumeClaim"]["claimName"]
                for volume in group.template["spec"]["volumes"]
                if "persistentVolumeClaim" in volume
            ]
            assert claims == [TREES["storage"]["metadata"]["name"]]


SERVE_CONFIGS = sorted((ROOT / "serve_configs").glob("*.yaml"))


@pytest.fixture(scope="module", params=[None, *SERVE_CONFIGS], ids=lambda path: path.stem if path else "smallest")
def serve_config(request, tmp_path_factory):
    """Each shipped Serve config, and the smallest possible one."""
    if request.param is not None:
        return request.param
    path = tmp_path_factory.mktemp("serve") / "smallest.yaml"
    path.write_text("applications:\n  - {name: one, import_path: 'finlora.serve:app', route_prefix: /}\n")
    return path


# Ray Serve's schemas use a form of pydantic's Field that pydantic 2 warns of.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_service_of_each_serve_config_is_of_the_real_schemas(serve_config):
    from ray.serve.schema import ServeDeploySchema

    done = subprocess.run(
        [sys.executable, str(ROOT / "cluster" / "kuberay" / "rayservice.py"), str(serve_config)],
        capture_output=True,
        text=True,
        check=True,
    )
    tree = yaml.safe_load(done.stdout)
    spec = check_manifest(tree)
    assert tree["metadata"]["name"] == f"finlora-{serve_config.stem}"
    deployed = yaml.safe_load(tree["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(deployed)
    assert deployed["applications"] == yaml.safe_load(serve_config.read_text())["applications"]
    assert deployed["http_options"]["host"] == "0.0.0.0"
    assert spec.auth_options.mode == "token"
    for group in (spec.head_group_spec, *spec.worker_group_specs):
        (container,) = group.template["spec"]["containers"]
        assert {"name": "serve", "containerPort": 8000} in container["ports"]


def test_service_without_a_file_says_how():
    command = [sys.executable, str(ROOT / "cluster" / "kuberay" / "rayservice.py"), "absent.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Give one file of serve_configs/" in done.stderr
