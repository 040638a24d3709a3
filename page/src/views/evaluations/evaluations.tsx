import { api, ask, type Evaluation } from "../../api/client";
import { Show, useFresh, useLoaded } from "../../parts/loading/loading";
import { href, route } from "../../parts/route/route";
import { hasEnded, Status } from "../../parts/status/status";
import { moment, percent, visible, zone } from "../../parts/words/words";
import { mainResult } from "../../parts/results/results";

const PAGE = 25;

export function Evaluations() {
  const after = route.value.query.get("after") ?? undefined;
  const loaded = useLoaded((signal) => list(after, signal), [after]);
  useFresh(loaded, !after || Boolean(loaded.value?.data.some((each) => !hasEnded(each.status))));
  return (
    <>
      <div class="heading">
        <h1>Evaluations</h1>
        <a class="button main" href={href(["evaluations", "new"])}>
          New evaluation
        </a>
      </div>
      <Show of={loaded}>
        {(page) => (
          <>
            {page.data.length ? <Table evaluations={page.data} /> : <Nothing />}
            <nav class="pages" aria-label="Pages">
              {after && <a href={href("evaluations")}>Newest evaluations</a>}
              {page.has_more && <a href={href("evaluations", { after: page.last_id })}>Older evaluations</a>}
            </nav>
          </>
        )}
      </Show>
    </>
  );
}

function list(after: string | undefined, signal: AbortSignal) {
  return ask(api.GET("/v1/x/evaluations", { params: { query: { limit: PAGE, after } }, signal }));
}

function Nothing() {
  return (
    <p class="note">
      An evaluation tells whether a model answers better than another, and how far training has moved it. There are no
      evaluations here. <a href={href(["evaluations", "new"])}>Make the first one</a>.
    </p>
  );
}

function Table({ evaluations }: { evaluations: Evaluation[] }) {
  return (
    <table class="list">
      <thead>
        <tr>
          <th>Evaluation</th>
          <th>Status</th>
          <th>Model</th>
          <th>Result</th>
          <th>Created</th>
        </tr>
      </thead>
      <tbody>
        {evaluations.map((each) => (
          <Row key={each.id} evaluation={each} />
        ))}
      </tbody>
    </table>
  );
}

function Row({ evaluation }: { evaluation: Evaluation }) {
  const { id, kind, status, model, progress, waits_for, error } = evaluation;
  const result = mainResult(evaluation);
  return (
    <tr>
      <th scope="row">
        <a href={href(["evaluations", id])}>{kind}</a>
        <small class="id">{id}</small>
      </th>
      <td data-label="Status">
        <Status of={status} />
        {status === "running" && <small>{percent(progress)}</small>}
        {waits_for && <small>{visible(waits_for)}</small>}
        {error && <small class="bad">{visible(error.message)}</small>}
      </td>
      <td data-label="Model">{model}</td>
      <td data-label="Result">{result ? `${result.name} ${result.value} (${result.interval})` : "–"}</td>
      <td data-label="Created" title={zone()}>
        {moment(evaluation.created_at)}
      </td>
    </tr>
  );
}
