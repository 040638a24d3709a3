import { Download } from "../../parts/download/download";
import { Show, useFresh, useLoaded } from "../../parts/loading/loading";
import { NoModels } from "../../parts/no-models/no-models";
import { href, route } from "../../parts/route/route";
import { moment, zone } from "../../parts/words/words";
import { loadRows, type Row as Found } from "./load";
import { Acts, State } from "./state";

export function Models() {
  const after = route.value.query.get("after") ?? undefined;
  const loaded = useLoaded((signal) => loadRows(after, signal), [after]);
  useFresh(loaded);
  return (
    <>
      <div class="heading">
        <h1>Models</h1>
      </div>
      <Show of={loaded}>
        {({ rows, trouble, next }) => (
          <>
            {trouble && <p class="warn">{trouble}</p>}
            {rows.length ? <Table rows={rows} again={loaded.again} /> : <Nothing isFirst={!after} />}
            <nav class="pages" aria-label="Pages">
              {after && <a href={href("models")}>First models</a>}
              {next && <a href={href("models", { after: next })}>Further models</a>}
            </nav>
          </>
        )}
      </Show>
    </>
  );
}

function Nothing({ isFirst }: { isFirst: boolean }) {
  if (!isFirst) return <p class="note">There are no further models.</p>;
  return <NoModels />;
}

function Table({ rows, again }: { rows: Found[]; again: () => void }) {
  return (
    <table class="list">
      <thead>
        <tr>
          <th>Model</th>
          <th>What it is</th>
          <th>State</th>
          <th>Created</th>
          <th>Acts</th>
        </tr>
      </thead>
      <tbody>
        {rows.map((row) => (
          <Row key={row.model.id} row={row} again={again} />
        ))}
      </tbody>
    </table>
  );
}

function Row({ row: { model, deployment }, again }: { row: Found; again: () => void }) {
  const { job, kind } = model.x_raydpo;
  return (
    <tr>
      <th scope="row">
        <a href={href(["models", model.id])}>{model.id}</a>
      </th>
      <td data-label="What it is">{whatIs(model)}</td>
      <td data-label="State">
        <State of={deployment} />
      </td>
      <td data-label="Created" title={zone()}>
        {job ? moment(model.created) : "–"}
      </td>
      <td>
        <div class="acts">
          <Acts of={deployment} onChange={again} />
          {kind === "policy" && (
            <a class="button" href={href("ask", { a: model.id })} aria-label={`Ask ${model.id}`}>
              Ask
            </a>
          )}
          {job && <Download model={model.id} />}
        </div>
      </td>
    </tr>
  );
}

export function whatIs({ id, x_raydpo: { job, kind, root, adapter } }: Found["model"]): string {
  if (!job) return "base model";
  const what = kind === "reward" ? "reward model" : id.includes(":ckpt-step-") ? "checkpoint" : "policy";
  return `${what} on ${root}, ${adapter === "none" ? "all weights" : "an adapter"}`;
}
