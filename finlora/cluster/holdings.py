"""Who holds the GPUs and cores of a cluster, in the user's terms: services, trainings, searches and evaluations by their names.

Ray tells of placement groups, actors and tasks. What they belong to is read from Serve's actor names, from the names of our own
groups, and for groups that Ray makes for us from a note in the cluster's key-value store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MARK = " #"
"""Between a group's title and what makes its name unique."""

_LIMIT = 10_000
"""Most actors, tasks, groups or jobs read at once; Ray itself stops there."""
_MAX_COMMAND = 120
_NOTES = "finlora"
"""Namespace of the titles in the key-value store."""
_SERVE_NAMESPACE = "serve"
_REPLICA = "SERVE_REPLICA::"
_SEARCH_CLASS = "ImplicitFunc"  # the class that Ray Tune makes of a function


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """What one placement group, actor or task, or several of one owner, keep from others."""

    amount: float
    what: str
    """`the service NAME`, `the training NAME`; else the name of the group or actor, or the classes and functions in it."""
    source: str
    """The job's submission id or its driver's process, and its command; or how to end what no job holds."""


def note_title(group_id: str, title: str) -> None:
    """Write down to whom a placement group belongs that Ray made, and named, for us.

    Args:
        group_id: its id in hex.
        title: as `the training NAME`.
    """
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(group_id, title.encode(), namespace=_NOTES)


def list_holdings(kind: str) -> list[Holding]:
    """Return who holds a resource of the connected cluster, largest share first.

    Args:
        kind: Ray's name of the resource, as `GPU`.
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
    """Return who holds a resource, from Ray's own records; what belongs to one owner is added up.

    Args:
        groups, actors, tasks: those that hold something now.
        jobs: all of the cluster's.
        titles: placement group id -> whose it is, by `note_title`.
    """
    members = [*actors, *tasks]
    sources = _describe_jobs(jobs)
    amounts: dict[tuple[str, str], float] = {}

    def add(amount: float, what: str, job_id: str | None) -> None:
        is_service = what.startswith("the service ")
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
            add(amount, title or ", ".join(words) or "a group that nothing runs in", group.creator_job_id)
    for member in members:
        amount = (member.required_resources or {}).get(kind, 0.0)
        if amount and not member.placement_group_id:
            add(amount, _name_member(member), member.job_id)
    holdings = [Holding(amount=amount, what=what, source=source) for (what, source), amount in amounts.items()]
    return sorted(holdings, key=lambda holding: -holding.amount)


def name_service(application: str) -> str:
    """Return what others read of a served application that holds what they wait for."""
    return f"the service {application}"


def _name_member(member: Any) -> str:
    """Return the service that an actor is of, else its own name or class, or a task's function."""
    name = str(member.name or "")
    if getattr(member, "ray_namespace", None) == _SERVE_NAMESPACE and name.startswith(_REPLICA):
        return name_service(name.removeprefix(_REPLICA).partition("#")[0])
    class_name = str(getattr(member, "class_name", None) or "")
    if class_name == _SEARCH_CLASS:
        return "a search (Ray Tune)"
    return name or class_name


def _describe_jobs(jobs: Iterable[Any]) -> Callable[[str | None], str]:
    """Return a function from a job's id to its submission id or driver, and its command; empty for one that Ray hides.

    What `serve deploy` starts belongs to a job of the dashboard's own, of which Ray tells nothing.
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
    """Return a job's command, cut to what tells it from others: script, config and the first settings."""
    return command if len(command) <= _MAX_COMMAND else f"{command[:_MAX_COMMAND]}..."


def _read_title(group_id: str) -> str:
    from ray.experimental.internal_kv import _internal_kv_get

    return (_internal_kv_get(group_id, namespace=_NOTES) or b"").decode(errors="replace")


def _ask(list_states: Callable[..., list[Any]]) -> list[Any]:
    import ray

    # Named, since Ray would look for a cluster by itself and give up where a machine runs several.
    address = ray.get_runtime_context().gcs_address
    return list_states(address=address, detail=True, limit=_LIMIT, raise_on_missing_output=False)
