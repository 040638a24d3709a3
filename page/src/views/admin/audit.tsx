import { api, ask, type AuditEntry } from "../../api/client";
import { Show, useLoaded } from "../../parts/loading/loading";
import { href, route, setQuery } from "../../parts/route/route";
import { count, moment, visible, zone } from "../../parts/words/words";
import { loadKeyNames, loadProjects } from "./load";

const PAGE = 50;

/** Who changed what, and what was refused. */
export function Audit() {
  const { query } = route.value;
  const project_id = query.get("project") || undefined;
  const after = Number(query.get("after")) || undefined;
  const entries = useLoaded(
    (signal) => ask(api.GET("/v1/x/audit", { params: { query: { limit: PAGE, after, project_id } }, signal })),
    [after, project_id],
  );
  const projects = useLoaded(loadProjects, []);
  const keys = useLoaded(loadKeyNames, []);
  return (
    <>
      <div class="heading">
        <h1>Audit</h1>
        <label>
          Project{" "}
          <select value={project_id ?? ""} onChange={(event) => setQuery({ project: event.currentTarget.value, after: null })}>
            <option value="">all that you manage</option>
            {projects.value?.map((project) => <option value={project.id}>{visible(project.name)}</option>)}
          </select>
        </label>
      </div>
      <Show of={entries}>
        {(page) => (
          <>
            {page.data.length ? (
              <Table entries={page.data} names={keys.value ?? new Map()} />
            ) : (
              <p class="note">{after ? "There are no older entries." : "Nothing was changed yet."}</p>
            )}
            <nav class="pages" aria-label="Pages">
              {after && <a href={href(["admin", "audit"], { project: project_id })}>Newest entries</a>}
              {page.has_more && <a href={href(["admin", "audit"], { project: project_id, after: page.last_id })}>Older entries</a>}
            </nav>
          </>
        )}
      </Show>
    </>
  );
}

function Table({ entries, names }: { entries: AuditEntry[]; names: Map<string, string> }) {
  return (
    <table class="list">
      <thead>
        <tr>
          <th>What</th>
          <th>When</th>
          <th>Object</th>
          <th>Key</th>
          <th>Outcome</th>
        </tr>
      </thead>
      <tbody>
        {entries.map((entry) => (
          <tr key={entry.id}>
            <th scope="row">
              <code>{entry.action}</code>
            </th>
            <td data-label="When" title={zone()}>
              {moment(entry.created_at)}
            </td>
            <td data-label="Object">{entry.object_id ?? "–"}</td>
            <td data-label="Key">
              {names.get(entry.key_id) ?? entry.key_id}
              <small class="id">{entry.request_id}</small>
            </td>
            <td data-label="Outcome" class={entry.status === 200 ? undefined : "bad"}>
              {outcomeOf(entry)}
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function outcomeOf({ status, code, num_requests }: AuditEntry): string {
  if (status === 200) return "done";
  const times = num_requests > 1 ? `, ${count(num_requests, "request")}` : "";
  return `refused with ${status}${code ? ` ${code}` : ""}${times}`;
}
