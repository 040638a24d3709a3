import { api, ask, type Sweep } from "../../api/client";
import { Show, useFresh, useLoaded } from "../../parts/loading/loading";
import { href, route } from "../../parts/route/route";
import { Status } from "../../parts/status/status";
import { figure, moment, visible, whole, zone } from "../../parts/words/words";
import { shortNames, valueText } from "./names";

const PAGE = 25;

export function Sweeps() {
  const after = route.value.query.get("after") ?? undefined;
  const loaded = useLoaded((signal) => list(after, signal), [after]);
  useFresh(loaded, !after || Boolean(loaded.value?.data.some((each) => each.status === "running")));
  return (
    <>
      <div class="heading">
        <h1>Sweeps</h1>
        <a class="button main" href={href(["sweeps", "new"])}>
          New sweep
        </a>
      </div>
      <Show of={loaded}>
        {(page) => (
          <>
            {page.data.length ? <Table sweeps={page.data} /> : <Nothing />}
            <nav class="pages" aria-label="Pages">
              {after && <a href={href("sweeps")}>Newest sweeps</a>}
              {page.has_more && <a href={href("sweeps", { after: page.last_id })}>Older sweeps</a>}
            </nav>
          </>
        )}
      </Show>
    </>
  );
}

function list(after: string | undefined, signal: AbortSignal) {
  return ask(api.GET("/v1/x/sweeps", { params: { query: { limit: PAGE, after } }, signal }));
}

function Nothing() {
  return (
    <p class="note">
      A sweep tries several values of a job's options, and shows which trained the best model. There are no sweeps here.{" "}
      <a href={href(["sweeps", "new"])}>Make the first one</a>.
    </p>
  );
}

function Table({ sweeps }: { sweeps: Sweep[] }) {
  return (
    <table class="list">
      <thead>
        <tr>
          <th>Sweep</th>
          <th>Status</th>
          <th>Trials</th>
          <th>Best</th>
          <th>Created</th>
        </tr>
      </thead>
      <tbody>
        {sweeps.map((each) => (
          <Row key={each.id} sweep={each} />
        ))}
      </tbody>
    </table>
  );
}

function Row({ sweep }: { sweep: Sweep }) {
  const names = shortNames(Object.keys(sweep.request.parameters as object));
  return (
    <tr>
      <th scope="row">
        <a href={href(["sweeps", sweep.id])}>{[...names.values()].join(", ")}</a>
        <small class="id">{sweep.id}</small>
      </th>
      <td data-label="Status">
        <Status of={sweep.status} />
        {sweep.waits_for && <small>{visible(sweep.waits_for)}</small>}
        {sweep.error && <small class="bad">{visible(sweep.error.message)}</small>}
      </td>
      <td data-label="Trials">{trialsOf(sweep)}</td>
      <td data-label="Best">
        {sweep.best ? `${valueText(sweep.best.parameters, names)}: ${figure(sweep.best.value!)}` : "–"}
      </td>
      <td data-label="Created" title={zone()}>
        {moment(sweep.created_at)}
      </td>
    </tr>
  );
}

/** Such as "3 of 5: 1 training, 2 succeeded". */
export function trialsOf({ trials, num_trials }: Sweep): string {
  const begun = Object.values(trials).reduce((sum, number) => sum + number, 0);
  const states = Object.entries(trials).map(([state, number]) => `${whole(number)} ${state}`);
  return `${whole(begun)} of ${whole(num_trials)}${states.length ? `: ${states.join(", ")}` : ""}`;
}
