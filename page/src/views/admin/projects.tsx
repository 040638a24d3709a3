import { useState } from "preact/hooks";
import { api, ask, Failure, type Project } from "../../api/client";
import { FailureNote, Show, useLoaded } from "../../parts/loading/loading";
import { href, route } from "../../parts/route/route";
import { moment, visible, zone } from "../../parts/words/words";
import { LIMITS, shown } from "./limits";

const PAGE = 25;

/** The projects that the reader manages, and the form that makes one. */
export function Projects() {
  const after = route.value.query.get("after") ?? undefined;
  const projects = useLoaded(
    (signal) => ask(api.GET("/v1/x/projects", { params: { query: { limit: PAGE, after } }, signal })),
    [after],
  );
  return (
    <>
      <div class="heading">
        <h1>Projects</h1>
      </div>
      <Show of={projects}>
        {(page) => (
          <>
            {page.data.length ? <Table projects={page.data} /> : <p class="note">There are no older projects.</p>}
            <nav class="pages" aria-label="Pages">
              {after && <a href={href(["admin", "projects"])}>Newest projects</a>}
              {page.has_more && <a href={href(["admin", "projects"], { after: page.last_id })}>Older projects</a>}
            </nav>
          </>
        )}
      </Show>
      <Make />
    </>
  );
}

function Table({ projects }: { projects: Project[] }) {
  return (
    <table class="list">
      <thead>
        <tr>
          <th>Project</th>
          <th>Created</th>
          <th class="number">Weight</th>
          <th>Limits</th>
        </tr>
      </thead>
      <tbody>
        {projects.map((project) => (
          <tr key={project.id}>
            <th scope="row">
              <a href={href(["admin", "projects", project.id])}>{visible(project.name)}</a>
              <small class="id">{project.id}</small>
              {project.archived_at && <small>archived {moment(project.archived_at)}</small>}
            </th>
            <td data-label="Created" title={zone()}>
              {moment(project.created_at)}
            </td>
            <td data-label="Weight" class="number">
              {project.weight}
            </td>
            <td data-label="Limits">{limitsOf(project)}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function limitsOf(project: Project): string {
  const set = LIMITS.filter(({ name }) => project[name] !== null);
  return set.map(({ name, label }) => `${label}: ${shown(name, project[name]!)}`).join("; ") || "none";
}

function Make() {
  const [failure, setFailure] = useState<Failure>();

  async function make(event: SubmitEvent) {
    event.preventDefault();
    const name = String(new FormData(event.currentTarget as HTMLFormElement).get("name")).trim();
    setFailure(undefined);
    try {
      const made = await ask(api.POST("/v1/x/projects", { body: { name, weight: 1 } }));
      location.hash = href(["admin", "projects", made.id]);
    } catch (error) {
      setFailure(Failure.of(error));
    }
  }

  return (
    <form class="panel" onSubmit={make}>
      <h2>Make a project</h2>
      <label for="name">Name</label>
      <input id="name" name="name" required maxLength={64} aria-describedby="name-hint" />
      <p class="hint" id="name-hint">
        You set its limits next, and make keys for it.
      </p>
      {failure && <FailureNote failure={failure} />}
      <div class="acts">
        <button class="main">Make the project</button>
      </div>
    </form>
  );
}
