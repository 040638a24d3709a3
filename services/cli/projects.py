"""raydpo projects: who owns what, and how much of it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.client import api_command, id_argument, out
from services.cli.lists import list_command

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(no_args_is_help=True, help="Create projects and set their limits. Needs an admin key.")

LIMITS = ("max_running_jobs", "max_queued_jobs", "max_bytes", "max_accelerator_hours")

ProjectId = Annotated[str, id_argument()]


def _number(text: str) -> str:
    if text != "none":
        try:
            float(text)
        except ValueError:
            raise typer.BadParameter(f"{text} is neither a number nor none") from None
    return text


def _limit(of: str) -> Any:
    return typer.Option(
        metavar="N|none",
        parser=_number,
        help=f"Most {of}; `none` takes the limit away. Default: no limit, or as it is.",
    )


Running = Annotated[str | None, _limit("jobs that run at once")]
Queued = Annotated[str | None, _limit("jobs that wait")]
Bytes = Annotated[str | None, _limit("bytes of files")]
Hours = Annotated[str | None, _limit("accelerator hours in all")]

Weight = Annotated[
    float | None,
    typer.Option(metavar="N", help="Its share of the cluster, relative to other projects. Default: 1, or as it is."),
]


def _given(name: str | None, weight: float | None, *limits: str | None) -> dict[str, Any]:
    """The body. The service checks the numbers."""
    said = {key: text for key, text in zip(LIMITS, limits, strict=True) if text is not None}
    values = {key: None if text == "none" else float(text) for key, text in said.items()}
    return values | {key: value for key, value in (("name", name), ("weight", weight)) if value is not None}


@api_command(app)
def create(
    client: "OpenAI",
    name: Annotated[str, typer.Argument(metavar="NAME")],
    weight: Weight = None,
    max_running_jobs: Running = None,
    max_queued_jobs: Queued = None,
    max_bytes: Bytes = None,
    max_accelerator_hours: Hours = None,
) -> None:
    """Create a project and print its id."""
    body = _given(name, weight, max_running_jobs, max_queued_jobs, max_bytes, max_accelerator_hours)
    project: Any = client.post("/x/projects", cast_to=object, body=body)
    out.print(project["id"])


@api_command(app, "set")
def change(
    client: "OpenAI",
    project_id: ProjectId,
    name: Annotated[str | None, typer.Option(help="A new name. Default: as it is.")] = None,
    weight: Weight = None,
    max_running_jobs: Running = None,
    max_queued_jobs: Queued = None,
    max_bytes: Bytes = None,
    max_accelerator_hours: Hours = None,
) -> None:
    """Change a project's name, weight or limits, and print it."""
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
    """Show what a project uses of its limits."""
    out.print_json(data=client.get(f"/x/projects/{project_id}/usage", cast_to=object))


@api_command(app)
def archive(client: "OpenAI", project_id: ProjectId) -> None:
    """Stop a project's keys. Its files, jobs and models stay."""
    client.post(f"/x/projects/{project_id}/archive", cast_to=object)
    out.print(f"archived {project_id}")
