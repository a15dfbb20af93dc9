"""Print the RayService of any deployment of serve_configs/: its own cluster, replaced without a pause when it changes.

    python cluster/kuberay/rayservice.py serve_configs/NAME.yaml | kubectl -n finlora apply -f -

KubeRay wants the Serve config as a text within its manifest. It is put there from its one source, and the cluster is that
of raycluster.yaml, so that neither exists twice. After storage.yaml and network.yaml; clients come from pods that carry the
label finlora-client: "true", or by `kubectl port-forward service/NAME-serve-svc 8000:8000`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
PORT = 8000


def make_service(serve_config: Path) -> dict[str, Any]:
    """Return the RayService of a Serve config file; named as the file."""
    config = yaml.safe_load(serve_config.read_text(encoding="utf-8"))
    # The pod's own loopback would hide it from its Kubernetes service; network.yaml keeps strangers out instead.
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
