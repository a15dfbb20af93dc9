"""The image contains all that its users start: paths of the manifests, job scripts with their configs, and Serve configs."""

from __future__ import annotations

import shlex
from pathlib import Path, PurePosixPath

import pytest
import yaml

from finlora.config import DataConfig, RunConfig

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
}
HOME = PurePosixPath("/home/ray")


class Image:
    """Files that a Containerfile copies and creates, read line by line."""

    def __init__(self, text: str) -> None:
        lines = [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]
        self.workdir = PurePosixPath(next(words[1] for words in lines if words[0] == "WORKDIR"))
        runs = [" ".join(words[1:]) for words in lines if words[0] == "RUN"]
        made = [command for run in runs for command in run.split(" && ") if command.startswith("mkdir -p ")]
        self.folders = {PurePosixPath(word) for command in made for word in command.split()[2:]}
        self.user_id = next(int(run.split("--uid ")[1].split()[0]) for run in runs if "--uid" in run)
        self.owned = next(run.split("chown -R ray:ray ")[1].split() for run in runs if "chown -R ray:ray" in run)
        self.copied = {}
        for _, _, *sources, target in (words for words in lines if words[0] == "COPY"):
            for source in sources:
                copied_to = PurePosixPath(target) / Path(source).name if target == "./" else PurePosixPath(target)
                self.copied[self.workdir / copied_to] = ROOT / source

    def find(self, path: str, below: PurePosixPath | None = None) -> Path | None:
        """Return the file of the checkout that was copied to a path of the image, or None."""
        whole = (below or self.workdir) / path
        for target, source in self.copied.items():
            if whole == target or target in whole.parents:
                found = source / whole.relative_to(target)
                return found if found.exists() else None
        return None


IMAGE = Image((ROOT / "cluster" / "Containerfile").read_text())


def groups_of(tree):
    spec = tree["spec"].get("rayClusterSpec", tree["spec"])
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]] if "headGroupSpec" in spec else []


def test_what_is_not_copied_is_not_found():
    """Proves that the checks below can fail."""
    assert IMAGE.find("jobs/train.py") == ROOT / "jobs" / "train.py"
    assert IMAGE.find("jobs/absent.py") is None
    assert IMAGE.find("benchmarks/memory.py") is None
    without = Image(
        (ROOT / "cluster" / "Containerfile").read_text().replace("serve_configs serve_configs", "jobs other")
    )
    assert without.find("serve_configs/llama-8b-8bit.yaml") is None


def test_entry_point_of_the_job_starts_where_its_script_and_config_are():
    move, _, command = MANIFESTS["rayjob"]["spec"]["entrypoint"].partition(" && ")
    folder = PurePosixPath(move.removeprefix("cd "))
    assert folder == IMAGE.workdir
    paths = [word for word in shlex.split(command) if "/" in word]
    assert len(paths) == 2
    assert [path for path in paths if IMAGE.find(path, folder) is None] == []


@pytest.mark.parametrize("folder", ["jobs", "jobs/configs", "jobs/searches", "serve_configs"])
def test_all_that_a_cluster_is_asked_to_run_is_in_the_image(folder):
    files = [path for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".yaml")]
    assert files
    assert [path.name for path in files if IMAGE.find(f"{folder}/{path.name}") != path] == []


@pytest.mark.parametrize("name", [name for name, tree in MANIFESTS.items() if groups_of(tree)])
def test_pods_mount_the_storage_at_a_folder_that_the_images_user_owns(name):
    for group in groups_of(MANIFESTS[name]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsUser"] == IMAGE.user_id
        for container in pod["containers"]:
            mounts = {mount["name"]: PurePosixPath(mount["mountPath"]) for mount in container["volumeMounts"]}
            assert mounts.pop("shared-memory") == PurePosixPath("/dev/shm")
            assert set(mounts.values()) == {HOME / "finlora"} <= IMAGE.folders
            assert str(HOME) in IMAGE.owned


def test_data_runs_and_adapters_lie_on_the_mounted_storage():
    """~ is the home folder of the image's user."""
    paths = [DataConfig().dir, RunConfig().output_dir]
    for path in (ROOT / "serve_configs").glob("llama-*.yaml"):
        (application,) = yaml.safe_load(path.read_text())["applications"]
        assert IMAGE.find(f"{application['import_path'].partition(':')[0].replace('.', '/')}.py") is not None
        paths += [value for key, value in application["args"].items() if key.endswith(("_dir", "_file"))]
    assert len(paths) > 8
    assert [copied_to for copied_to in paths if not copied_to.startswith("~/finlora/")] == []
