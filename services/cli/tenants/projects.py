"""The `raydpo projects` commands: create and archive projects, set their limits and show their usage."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.client import api_command, id_argument, out
from services.cli.lists import list_command

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(no_args_is_help=True, help="Create projects and set their limits. Needs an admin key.")

LIMITS = ("max_running_jobs", "max_queued_jobs", "max_bytes", "max_accelerator_hours")

ProjectId = Annotated[str, id_argument("Id of the project.")]


def _number(text: str) -> str:
    if text != "none":
        try:
            float(text)
        except ValueError:
            raise typer.BadParameter(
                f"{text} is neither a number nor none; write a number, or none to remove the limit"
            ) from None
    return text


def _limit(of: str) -> Any:
    return typer.Option(
        metavar="N|none",
        parser=_number,
        help=f"Maximum number of {of}; `none` removes the limit. "
        "Default: no limit for a new project; an existing project keeps its limit.",
    )


Running = Annotated[str | None, _limit("the project's jobs that run at the same time")]
Queued = Annotated[str | None, _limit("the project's jobs that wait to run")]
Bytes = Annotated[str | None, _limit("bytes of the project's files")]
Hours = Annotated[str | None, _limit("accelerator hours that all the project's jobs may use together")]

Weight = Annotated[
    float | None,
    typer.Option(
        metavar="N",
        help="Weight of the project when projects compete for the cluster: a project with weight 2 gets twice the "
        "share of a project with weight 1. Default: 1 for a new project; an existing project keeps its weight.",
    ),
]


def _given(name: str | None, weight: float | None, *limits: str | None) -> dict[str, Any]:
    """Returns the body of a request that creates or changes a project, with a field for each option that the user gave.

    `limits` are the values of the options that limit the project, such as --max-bytes. The service, not the command,
    checks whether the numbers are allowed.
    """
    said = {key: text for key, text in zip(LIMITS, limits, strict=True) if text is not None}
    values = {key: None if text == "none" else float(text) for key, text in said.items()}
    return values | {key: value for key, value in (("name", name), ("weight", weight)) if value is not None}


@api_command(app)
def create(
    client: "OpenAI",
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new project.")],
    weight: Weight = None,
    max_running_jobs: Running = None,
    max_queued_jobs: Queued = None,
    max_bytes: Bytes = None,
    max_accelerator_hours: Hours = None,
) -> None:
    """Create a project and print the project's id."""
    body = _given(name, weight, max_running_jobs, max_queued_jobs, max_bytes, max_accelerator_hours)
    project: Any = client.post("/x/projects", cast_to=object, body=body)
    out.print(project["id"])


@api_command(app, "set")
def change(
    client: "OpenAI",
    project_id: ProjectId,
    name: Annotated[str | None, typer.Option(help="New name of the project. Default: no change.")] = None,
    weight: Weight = None,
    max_running_jobs: Running = None,
    max_queued_jobs: Queued = None,
    max_bytes: Bytes = None,
    max_accelerator_hours: Hours = None,
) -> None:
    """Change a project's name, weight or limits, and print the project as JSON."""
    body = _given(name, weight, max_running_jobs, max_queued_jobs, max_bytes, max_accelerator_hours)
    out.print_json(data=client.post(f"/x/projects/{project_id}", cast_to=object, body=body))


def _limits(project: dict[str, Any]) -> str:
    return " ".join(f"{name}={project[name]}" for name in LIMITS if project[name] is not None) or "none"


list_command(
    app,
    "/x/projects",
    "List the projects that you manage, newest first.",
    {
        "id": "id",
        "name": "name",
        "state": lambda project: "archived" if project["archived_at"] else "active",
        "limits": _limits,
    },
)


@api_command(app)
def usage(client: "OpenAI", project_id: ProjectId) -> None:
    """Show how much of each of a project's limits is used, as JSON."""
    out.print_json(data=client.get(f"/x/projects/{project_id}/usage", cast_to=object))


@api_command(app)
def archive(client: "OpenAI", project_id: ProjectId) -> None:
    """Archive a project. The project's keys stop working; the project's files, jobs and models are kept."""
    client.post(f"/x/projects/{project_id}/archive", cast_to=object)
    out.print(f"archived {project_id}")


@api_command(app)
def delete(client: "OpenAI", project_id: ProjectId) -> None:
    """Delete an archived project with everything that it owns: files, jobs, models, keys. This cannot be undone."""
    client.delete(f"/x/projects/{project_id}", cast_to=object)
    out.print(f"deleted {project_id}")
