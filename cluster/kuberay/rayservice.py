"""Print a RayService manifest for a Serve YAML of serve_configs/: its own cluster, replaced without a pause when it changes.

    python cluster/kuberay/rayservice.py serve_configs/NAME.yaml | kubectl -n finlora apply -f -

KubeRay needs the Serve config as a text in its manifest. The script inserts it, with the cluster of raycluster.yaml, so that
neither is stored twice. Apply storage.yaml and network.yaml first. Clients are pods with the label finlora-client: "true", or
use `kubectl port-forward service/NAME-serve-svc 8000:8000`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
PORT = 8000


def make_service(serve_config: Path) -> dict[str, Any]:
    """Return the RayService of a Serve config file, named like the file."""
    config = yaml.safe_load(serve_config.read_text(encoding="utf-8"))
    # On the pod's loopback the Kubernetes service could not reach it; network.yaml keeps others out instead.
    config["http_options"] = {**config.get("http_options", {}), "host": "0.0.0.0", "port": PORT}
    cluster = yaml.safe_load((HERE / "raycluster.yaml").read_text(encoding="utf-8"))["spec"]
    # The operator deploys and watches the applications through the dashboard.
    cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] = "0.0.0.0"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            container.setdefault("ports", []).append({"name": "serve", "containerPort": PORT})
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": f"finlora-{serve_config.stem}"},
        "spec": {"serveConfigV2": yaml.safe_dump(config, sort_keys=False), "rayClusterConfig": cluster},
    }


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("Give one file of serve_configs/: python cluster/kuberay/rayservice.py serve_configs/NAME.yaml")
    sys.stdout.write(yaml.safe_dump(make_service(Path(sys.argv[1])), sort_keys=False))
