"""Find tasks by name."""

from __future__ import annotations

from greenvis.errors import BadInput
from greenvis.plugins import Door
from greenvis.tasks.base import Task

DOOR = Door(
    "task", Task, "greenvis.tasks", "greenvis.tasks",
    besides=["answers", "base", "continual", "registry"],
)  # fmt: skip
names, find = DOOR.names, DOOR.find


def resolve(task: str | Task) -> Task:
    """Return a task by its name, or as it is.

    Args:
        task: A name ("classification"), or a task made.

    Returns:
        The task.

    Raises:
        BadInput: For a name that is none, and for what is no task.
    """
    if isinstance(task, str):
        return find(task)()
    if not isinstance(task, Task):
        hint = f"; write {task.__name__}()" if isinstance(task, type) else ""
        raise BadInput(f"task= takes a name or a task, not {task!r}{hint}")
    return task
