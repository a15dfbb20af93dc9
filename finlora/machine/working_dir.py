"""Working directory of a Ray job: a temporary copy of the caller's folder, deleted with all that is written to it."""

from __future__ import annotations

from pathlib import Path

from finlora.errors import ConfigError


def is_job_copy() -> bool:
    """Return whether this process runs in the copy that `ray job submit --working-dir` uploaded."""
    return "runtime_resources" in Path.cwd().parts


def describe_lost(option: str, path: Path | str) -> str | None:
    """Return why output at a path would be lost; None if it would not.

    Args:
        option: the option as the user typed it, such as `--output ` or `output_dir=`.
        path: the path as the user typed it.
    """
    if Path(path).expanduser().is_absolute() or not is_job_copy():
        return None
    # Quoted: otherwise the submitting shell expands ~ to the home folder of its own machine.
    return (
        f"{option}{path} is relative, but this Ray job runs in a temporary copy of your folder, which is deleted with all that "
        f"is written there: give an absolute path on the cluster's storage, for example {option}'~/finlora/{Path(path).name}'"
    )


def resolve_output(option: str, path: Path) -> Path:
    """Return the absolute path of a verb's output.

    Raises:
        ConfigError: the path is relative inside a submitted Ray job.
    """
    lost = describe_lost(option, path)
    if lost:
        raise ConfigError(f"{lost}.")
    return path.expanduser().absolute()
