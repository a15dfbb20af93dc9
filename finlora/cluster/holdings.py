"""Holders of a cluster's GPUs and cores: services, trainings, searches and evaluations by name.

Ray lists placement groups, actors and tasks. Their owner is read from Serve's actor names, from the names of our own groups, and
for groups that Ray creates for us from a note in the cluster's key-value store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MARK = " #"
"""Separates a group's title from the suffix that makes its name unique."""

_LIMIT = 10_000
"""Most actors, tasks, groups or jobs to list; Ray's own limit."""
_MAX_COMMAND = 120
_NOTES = "finlora"
"""Namespace of the titles in the key-value store."""
_SERVICE = "the service "
"""Start of the title of a served application."""
_SERVE_NAMESPACE = "serve"
_REPLICA = "SERVE_REPLICA::"
_SEARCH_CLASS = "ImplicitFunc"  # the class in which Ray Tune wraps a function


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """Amount of a resource that one owner holds, in placement groups, actors and tasks."""

    amount: float
    what: str
    """`the service NAME`, `the training NAME`; otherwise the name of the group or actor, or the classes and functions in it."""
    source: str
    """Submission id or driver process of its job, and the command; without a job, the command that ends it."""


def note_title(group_id: str, title: str) -> None:
    """Record the owner of a placement group that Ray created, and named, for us.

    Args:
        group_id: its id in hex.
        title: such as `the training NAME`.
    """
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(group_id, title.encode(), namespace=_NOTES)


def list_holdings(kind: str) -> list[Holding]:
    """Return the holders of a resource of the connected cluster, largest amount first.

    Args:
        kind: Ray's name of the resource, such as `GPU`.
    """
    from ray.util.state import list_actors, list_jobs, list_placement_groups, list_tasks

    groups = [group for group in _ask(list_placement_groups) if group.state == "CREATED"]
    return collect(
        kind,
        groups,
        [actor for actor in _ask(list_actors) if actor.state == "ALIVE"],
        [task for task in _ask(list_tasks) if task.state == "RUNNING" and task.type == "NORMAL_TASK"],
        _ask(list_jobs),
        {group.placement_group_id: title for group in groups if (title := _read_title(group.placement_group_id))},
    )


def collect(
    kind: str,
    groups: Iterable[Any],
    actors: Iterable[Any],
    tasks: Iterable[Any],
    jobs: Iterable[Any],
    titles: Mapping[str, str],
) -> list[Holding]:
    """Return the holders of a resource from Ray's records, amounts summed by owner.

    Args:
        groups, actors, tasks: those that hold resources now.
        jobs: all jobs of the cluster.
        titles: placement group id -> its title by `note_title`.
    """
    members = [*actors, *tasks]
    sources = _describe_jobs(jobs)
    amounts: dict[tuple[str, str], float] = {}

    def add(amount: float, what: str, job_id: str | None) -> None:
        is_service = what.startswith(_SERVICE)
        source = sources(job_id) or ("`serve shutdown` ends it" if is_service else f"job {job_id}")
        amounts[what, source] = amounts.get((what, source), 0.0) + amount

    for group in groups:
        amount = sum(bundle["unit_resources"].get(kind, 0.0) for bundle in group.bundles or [])
        if amount:
            inside = Counter(
                _name_member(member) for member in members if member.placement_group_id == group.placement_group_id
            )
            title = titles.get(group.placement_group_id) or group.name.partition(MARK)[0]
            words = [name if name.startswith("a search") else f"{count} x {name}" for name, count in inside.items()]
            add(amount, title or ", ".join(words) or "an empty placement group", group.creator_job_id)
    for member in members:
        amount = (member.required_resources or {}).get(kind, 0.0)
        if amount and not member.placement_group_id:
            add(amount, _name_member(member), member.job_id)
    holdings = [Holding(amount=amount, what=what, source=source) for (what, source), amount in amounts.items()]
    return sorted(holdings, key=lambda holding: -holding.amount)


def name_service(application: str) -> str:
    """Return the title of a served application, shown to others who wait for its resources."""
    return f"{_SERVICE}{application}"


def _name_member(member: Any) -> str:
    """Return the service of an actor, otherwise its own name or class, or a task's function."""
    name = str(member.name or "")
    if getattr(member, "ray_namespace", None) == _SERVE_NAMESPACE and name.startswith(_REPLICA):
        return name_service(name.removeprefix(_REPLICA).partition("#")[0])
    class_name = str(getattr(member, "class_name", None) or "")
    if class_name == _SEARCH_CLASS:
        return "a search (Ray Tune)"
    return name or class_name


def _describe_jobs(jobs: Iterable[Any]) -> Callable[[str | None], str]:
    """Return a function from a job's id to its submission id or driver and its command; "" for a job that Ray does not list.

    What `serve deploy` starts belongs to a job of the dashboard's own, which Ray does not list.
    """
    known = {job.job_id: job for job in jobs if job.job_id}

    def describe(job_id: str | None) -> str:
        job = known.get(job_id)
        if job is None:
            return ""
        driver = f", process {job.driver_info.pid} on {job.driver_info.node_ip_address}" if job.driver_info else ""
        return f"job {job.submission_id or f'{job_id}{driver}'}: {_shorten(job.entrypoint)}"

    return describe


def _shorten(command: str) -> str:
    """Return a job's command, cut behind the script, config and first settings."""
    return command if len(command) <= _MAX_COMMAND else f"{command[:_MAX_COMMAND]}..."


def _read_title(group_id: str) -> str:
    from ray.experimental.internal_kv import _internal_kv_get

    return (_internal_kv_get(group_id, namespace=_NOTES) or b"").decode(errors="replace")


def _ask(list_states: Callable[..., list[Any]]) -> list[Any]:
    import ray

    # Given explicitly: on a machine with several clusters Ray does not find one.
    address = ray.get_runtime_context().gcs_address
    return list_states(address=address, detail=True, limit=_LIMIT, raise_on_missing_output=False)
