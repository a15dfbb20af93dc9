"""Schemas of the parts of KubeRay and Kubernetes that our manifests use, to find misspelt or misplaced fields.

Sources: fields and allowed values of KubeRay's resources from its reference of v1.7.0,
https://github.com/ray-project/kuberay/blob/97509c3a7216cf3440af381646560a1885afb53b/docs/reference/api.md; those of pods,
volumes and network policies from the models of the official Kubernetes client, which are made from its OpenAPI schema.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from kubernetes.client import models
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, TypeAdapter, model_validator
from pydantic.alias_generators import to_camel


def check_kubernetes(kind, tree, path=""):
    """Return the faults of a tree that its Kubernetes model accepts: unknown fields and wrong types.

    Args:
        kind: the model's name in the client, such as `V1PodTemplateSpec`, `List[V1Container]` or `Dict[str, str]`.
        tree: parsed YAML.
        path: its path, for messages.
    """
    if inner := re.fullmatch(r"List\[(.+)\]", kind):
        if not isinstance(tree, list):
            return [f"{path}: expected a list, found {tree!r}"]
        return [fault for n, item in enumerate(tree) for fault in check_kubernetes(inner[1], item, f"{path}[{n}]")]
    if inner := re.fullmatch(r"Dict\[str, (.+)\]", kind):
        if not isinstance(tree, dict):
            return [f"{path}: expected a map, found {tree!r}"]
        return [fault for key, item in tree.items() for fault in check_kubernetes(inner[1], item, f"{path}.{key}")]
    plain = {"str": str, "int": int, "bool": bool, "float": float, "object": object, "datetime": str}
    if kind in plain:
        is_right = isinstance(tree, plain[kind]) and not (kind == "int" and isinstance(tree, bool))
        return [] if is_right else [f"{path}: expected {kind}, found {tree!r}"]
    model = getattr(models, kind)
    if not isinstance(tree, dict):
        return [f"{path}: expected {kind}, found {tree!r}"]
    names = {written: attribute for attribute, written in model.attribute_map.items()}
    faults = [f"{path}.{key}: not a field of {kind}" for key in tree if key not in names]
    for key, value in tree.items():
        if key in names:
            faults += check_kubernetes(model.openapi_types[names[key]], value, f"{path}.{key}")
    return faults


def kubernetes(kind):
    """Return a pydantic type that holds a tree of that Kubernetes kind."""

    def check(tree: Any) -> Any:
        if faults := check_kubernetes(kind, tree):
            raise ValueError("; ".join(faults))
        getattr(models, kind).model_validate(tree)  # missing fields, values outside an enumeration
        return tree

    return Annotated[dict[str, Any], BeforeValidator(check)]


class Strict(BaseModel):
    """Part of a manifest that allows only known fields of the right type, without conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class AuthOptions(Strict):
    mode: Literal["disabled", "token"] = "token"
    secret_name: str | None = None


class HeadGroupSpec(Strict):
    ray_start_params: dict[str, str]
    template: kubernetes("V1PodTemplateSpec")
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None


class WorkerGroupSpec(Strict):
    group_name: str
    ray_start_params: dict[str, str]
    template: kubernetes("V1PodTemplateSpec")
    replicas: int = Field(0, ge=0)
    min_replicas: int = Field(0, ge=0)
    max_replicas: int = Field(2**31 - 1, ge=0)
    idle_timeout_seconds: int | None = None

    @model_validator(mode="after")
    def check_bounds(self):
        if not self.min_replicas <= self.replicas <= self.max_replicas:
            raise ValueError("expected minReplicas <= replicas <= maxReplicas")
        return self


class RayClusterSpec(Strict):
    ray_version: str
    auth_options: AuthOptions
    head_group_spec: HeadGroupSpec
    worker_group_specs: list[WorkerGroupSpec]
    enable_in_tree_autoscaling: bool | None = None


class RayJobSpec(Strict):
    entrypoint: str
    ray_cluster_spec: RayClusterSpec
    submission_mode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    backoff_limit: int = Field(0, ge=0)
    active_deadline_seconds: PositiveInt | None = None
    shutdown_after_job_finishes: bool = False
    ttl_seconds_after_finished: int = Field(0, ge=0)
    runtime_env_yaml: str | None = Field(None, alias="runtimeEnvYAML")

    @model_validator(mode="after")
    def check_clean_up(self):
        if self.ttl_seconds_after_finished and not self.shutdown_after_job_finishes:
            raise ValueError("ttlSecondsAfterFinished has no effect without shutdownAfterJobFinishes")
        return self


class RayServiceSpec(Strict):
    serve_config_v2: str
    ray_cluster_config: RayClusterSpec
    exclude_head_pod_from_serve_svc: bool | None = None
    serve_service: kubernetes("V1Service") | None = None


class _Resource(Strict):
    api_version: Literal["ray.io/v1"]
    metadata: kubernetes("V1ObjectMeta")


class RayCluster(_Resource):
    kind: Literal["RayCluster"]
    spec: RayClusterSpec


class RayJob(_Resource):
    kind: Literal["RayJob"]
    spec: RayJobSpec


class RayService(_Resource):
    kind: Literal["RayService"]
    spec: RayServiceSpec


RAY_KINDS = {model.__name__: model for model in (RayCluster, RayJob, RayService)}
KUBERNETES_KINDS = {
    ("v1", "PersistentVolumeClaim"): "V1PersistentVolumeClaim",
    ("networking.k8s.io/v1", "NetworkPolicy"): "V1NetworkPolicy",
}


def check_manifest(tree):
    """Check one document of a manifest; returns the RayClusterSpec of Ray's kinds, None for others."""
    if tree["apiVersion"].startswith("ray.io/"):
        spec = RAY_KINDS[tree["kind"]].model_validate(tree).spec
        return getattr(spec, "ray_cluster_spec", None) or getattr(spec, "ray_cluster_config", None) or spec
    TypeAdapter(kubernetes(KUBERNETES_KINDS[tree["apiVersion"], tree["kind"]])).validate_python(tree)
    return None
