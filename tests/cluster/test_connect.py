"""Connection to a cluster: token of a local one, checks of its size, and errors that come back as raised."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from finlora.cluster import connect
from finlora.errors import DatasetError, ResourceError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder and no authentication settings; restores the environment."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def test_local_cluster_is_guarded_by_a_private_token_of_our_own(home):
    connect._guard_local()
    path = home / ".config" / "finlora" / "ray-token"
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"]) == ("token", str(path))
    assert len(path.read_text()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not (home / ".ray").exists()


def test_token_is_made_once(home, monkeypatch):
    connect._guard_local()
    token = (home / ".config" / "finlora" / "ray-token").read_text()
    monkeypatch.delenv("RAY_AUTH_MODE")
    connect._guard_local()
    assert (home / ".config" / "finlora" / "ray-token").read_text() == token


def test_users_choice_of_authentication_is_kept(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    connect._guard_local()
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(("given", "used"), [(None, "0"), ("7", "7")])
def test_workers_of_a_local_ray_keep_the_priority_of_other_programs(home, monkeypatch, given, used):
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv(connect._NICENESS, given or "")
    if given is None:
        monkeypatch.delenv(connect._NICENESS)
    connect.prepare()
    assert os.environ[connect._NICENESS] == used


def test_a_running_cluster_keeps_its_workers_priority(home, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setenv(connect._NICENESS, "")
    monkeypatch.delenv(connect._NICENESS)
    connect.prepare()
    assert connect._NICENESS not in os.environ


def test_workers_of_a_running_cluster_get_the_cpu_environment(monkeypatch):
    """They inherit the environment of `ray start`, which the command cannot change."""
    asked = []
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # set by the user
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    for name in ("probe_cluster", "require_same_versions", "require_node_here"):
        monkeypatch.setattr(connect, name, lambda _found: None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: asked.append(options))
    connect.connect(log_to_driver=True)
    environment = {"OMP_WAIT_POLICY": "active", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
    assert asked == [{"log_to_driver": True, "runtime_env": {"env_vars": environment}}]


def test_a_thread_left_behind_starts_no_second_ray(monkeypatch):
    """Ray's functions start one by themselves where none runs: a search's thread did, while the stopped command was ending."""
    from ray._private import auto_init_hook

    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    for name in ("probe_cluster", "require_same_versions", "require_node_here"):
        monkeypatch.setattr(connect, name, lambda _found: None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    started = []
    monkeypatch.setattr("ray.init", lambda **_options: started.append("joined"))
    connect.connect(log_to_driver=False)
    auto_init_hook.auto_init_ray()
    assert started == ["joined"]


@pytest.mark.ray
def test_ray_does_not_take_sigterm_of_the_driver_with_its_crash_handler(ray_instance):
    """Source: absl/debugging/failure_signal_handler.cc sets SIGTERM and SIGTRAP among others, and nothing else takes SIGTRAP."""

    def catches_sigtrap():
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (signal.SIGTRAP - 1) & 1)

    assert not catches_sigtrap()
    assert connect.call(catches_sigtrap, num_cpus=0.5, num_gpus=0.0)  # a worker still shows the stack of its crash


@pytest.mark.ray
def test_workers_of_a_local_cluster_have_the_cpu_environment(ray_instance):
    def read():
        names = ("OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "OMP_NUM_THREADS")
        return [os.environ[name] for name in names], os.getpriority(os.PRIO_PROCESS, 0)

    values, niceness = connect.call(read, num_cpus=0.5, num_gpus=0.0)
    assert values == [os.environ["OMP_WAIT_POLICY"], "32", "1"]
    assert niceness == os.getpriority(os.PRIO_PROCESS, 0)  # Ray's default adds 15


@pytest.mark.ray
def test_requests_beyond_the_cluster_are_refused(ray_instance):
    connect.require(1, 0.5, 0.0)
    with pytest.raises(ResourceError, match=r"asks for 4 GPU \(2 workers x 2\), but the cluster has 0 \(0 free now\)"):
        connect.require(2, 0.5, 2.0)
    with pytest.raises(ResourceError, match=r"asks for 4000 CPU .*choose fewer workers or lower train.cpus_per_worker"):
        connect.require(4000, 1.0, 0.0)


@pytest.mark.ray
def test_task_returns_its_value_and_raises_our_errors_as_they_were(ray_instance):
    def divide(a, b):
        if b == 0:
            from finlora.errors import DatasetError

            raise DatasetError("line 3 is zero")
        return a / b

    assert connect.call(divide, 6, 3, num_cpus=0.5, num_gpus=0.0) == 2
    with pytest.raises(DatasetError, match=r"^line 3 is zero$"):
        connect.call(divide, 6, 0, num_cpus=0.5, num_gpus=0.0)


@pytest.mark.ray
def test_connecting_twice_keeps_the_cluster(ray_instance):
    import ray

    before = ray.get_runtime_context().get_node_id()
    connect.connect(log_to_driver=False)
    assert ray.get_runtime_context().get_node_id() == before
