"""The working directory of a Ray job: a temporary copy of the caller's folder, deleted with everything written into it."""

from __future__ import annotations

from pathlib import Path

from finlora.errors import ConfigError


def is_job_copy() -> bool:
    """Return whether this process runs in the copy that `ray job submit --working-dir` uploaded."""
    return "runtime_resources" in Path.cwd().parts


def describe_lost(option: str, path: Path | str) -> str | None:
    """Return why a path cannot keep what is written there; None where it can.

    Args:
        option: what the user typed before it, as `--output ` or `output_dir=`.
        path: as it was typed.
    """
    if Path(path).expanduser().is_absolute() or not is_job_copy():
        return None
    # In quotes, since the shell that submits would put the home folder of its own machine there.
    return (
        f"{option}{path} is relative, but this Ray job runs in a temporary copy of your folder, which is deleted with all that "
        f"is written there: give an absolute path on the cluster's storage, for example {option}'~/finlora/{Path(path).name}'"
    )


def resolve_output(option: str, path: Path) -> Path:
    """Return the absolute path of what a verb writes.

    Raises:
        ConfigError: it is relative inside a submitted Ray job.
    """
    lost = describe_lost(option, path)
    if lost:
        raise ConfigError(f"{lost}.")
    return path.expanduser().absolute()
