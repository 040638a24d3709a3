import { api, ask, type Usage as Row } from "../../api/client";
import { Show, useLoaded } from "../../parts/loading/loading";
import { href, route, setQuery } from "../../parts/route/route";
import { figure, visible, whole } from "../../parts/words/words";
import { loadKeyNames, loadProjects } from "./load";

const GROUPS = ["day", "model", "key", "project"] as const;
const PAGE = 100;

/** What completions and rewards used, by day, model, key or project. */
export function Usage() {
  const { query } = route.value;
  const group_by = GROUPS.find((each) => each === query.get("by")) ?? "day";
  const given = (name: string) => query.get(name) || undefined;
  const asked = { group_by, from: given("from"), to: given("to"), project_id: given("project"), after: given("after"), limit: PAGE };
  const usage = useLoaded((signal) => ask(api.GET("/v1/x/usage", { params: { query: asked }, signal })), [asked]);
  const projects = useLoaded(loadProjects, []);
  const keys = useLoaded(loadKeyNames, []);
  const nameOf = (id: string) =>
    visible((group_by === "key" ? keys.value?.get(id) : projects.value?.find((project) => project.id === id)?.name) ?? id);

  return (
    <>
      <div class="heading">
        <h1>Usage</h1>
        <label>
          By{" "}
          <select value={group_by} onChange={(event) => setQuery({ by: event.currentTarget.value, after: null })}>
            {GROUPS.map((each) => (
              <option>{each}</option>
            ))}
          </select>
        </label>
        <label>
          Project{" "}
          <select value={asked.project_id ?? ""} onChange={(event) => setQuery({ project: event.currentTarget.value, after: null })}>
            <option value="">all that you manage</option>
            {projects.value?.map((project) => <option value={project.id}>{visible(project.name)}</option>)}
          </select>
        </label>
        <Day name="from" label="From" value={asked.from} />
        <Day name="to" label="To" value={asked.to} />
      </div>
      <Show of={usage}>
        {(page) =>
          page.data.length ? (
            <>
              <Table rows={page.data} group={group_by} nameOf={nameOf} />
              <p class="hint">
                Requests and tokens of completions and rewards, {page.data[0]!.from} to {page.data[0]!.to}, days in UTC.
              </p>
              <nav class="pages" aria-label="Pages">
                {page.has_more && <a href={href(["admin", "usage"], { ...Object.fromEntries(query), after: page.last_id })}>Further rows</a>}
              </nav>
            </>
          ) : (
            <p class="note">Nobody asked a model in this time. Choose other days or another project.</p>
          )
        }
      </Show>
    </>
  );
}

function Day({ name, label, value }: { name: "from" | "to"; label: string; value?: string }) {
  return (
    <label class="day">
      {label}{" "}
      <input type="date" value={value ?? ""} onChange={(event) => setQuery({ [name]: event.currentTarget.value, after: null })} />
    </label>
  );
}

const COLUMNS = [
  ["Requests", "num_requests"],
  ["Tokens of prompts", "prompt_tokens"],
  ["Tokens of answers", "completion_tokens"],
  ["Accelerator seconds", "accelerator_seconds"],
] as const;

function Table({ rows, group, nameOf }: { rows: Row[]; group: string; nameOf: (id: string) => string }) {
  return (
    <table class="list">
      <thead>
        <tr>
          <th>{group[0]!.toUpperCase() + group.slice(1)}</th>
          {COLUMNS.map(([label]) => (
            <th class="number">{label}</th>
          ))}
        </tr>
      </thead>
      <tbody>
        {rows.map((row) => (
          <tr key={row.id}>
            <th scope="row">
              {nameOf(row.id)}
              {nameOf(row.id) !== row.id && <small class="id">{row.id}</small>}
            </th>
            {COLUMNS.map(([label, name]) => (
              <td class="number" data-label={label}>
                {name === "accelerator_seconds" ? figure(row[name]) : whole(row[name])}
              </td>
            ))}
          </tr>
        ))}
      </tbody>
    </table>
  );
}
