import { api, ask, type Rounds } from "../../api/client";
import { Show, useFresh, useLoaded } from "../../parts/loading/loading";
import { href, route } from "../../parts/route/route";
import { hasEnded, Status } from "../../parts/status/status";
import { moment, visible, zone } from "../../parts/words/words";
import { estimateText, qualityOf } from "./estimates";

const PAGE = 25;

/** The list of rounds. */
export function AllRounds() {
  const after = route.value.query.get("after") ?? undefined;
  const loaded = useLoaded((signal) => list(after, signal), [after]);
  useFresh(loaded, !after || Boolean(loaded.value?.data.some((each) => !hasEnded(each.status))));
  return (
    <>
      <div class="heading">
        <h1>Rounds</h1>
        <a class="button main" href={href(["rounds", "new"])}>
          New rounds
        </a>
      </div>
      <Show of={loaded}>
        {(page) => (
          <>
            {page.data.length ? <Table rounds={page.data} /> : <Nothing />}
            <nav class="pages" aria-label="Pages">
              {after && <a href={href("rounds")}>Newest rounds</a>}
              {page.has_more && <a href={href("rounds", { after: page.last_id })}>Older rounds</a>}
            </nav>
          </>
        )}
      </Show>
    </>
  );
}

function list(after: string | undefined, signal: AbortSignal) {
  return ask(api.GET("/v1/x/rounds", { params: { query: { limit: PAGE, after } }, signal }));
}

function Nothing() {
  return (
    <p class="note">
      In a round, a model writes answers, a judge scores them, and a job trains the model on the better and the worse ones.
      There are no rounds here. <a href={href(["rounds", "new"])}>Make the first ones</a>.
    </p>
  );
}

function Table({ rounds }: { rounds: Rounds[] }) {
  return (
    <table class="list">
      <thead>
        <tr>
          <th>First policy</th>
          <th>Status</th>
          <th>Round</th>
          <th>Best</th>
          <th>Created</th>
        </tr>
      </thead>
      <tbody>
        {rounds.map((each) => (
          <Row key={each.id} rounds={each} />
        ))}
      </tbody>
    </table>
  );
}

function Row({ rounds }: { rounds: Rounds }) {
  const quality = qualityOf(rounds.rounds);
  const best = rounds.rounds.find((each) => each.number === rounds.best_round)?.[quality.name];
  return (
    <tr>
      <th scope="row">
        <a href={href(["rounds", rounds.id])}>{String(rounds.request.model)}</a>
        <small class="id">{rounds.id}</small>
      </th>
      <td data-label="Status">
        <Status of={rounds.status} />
        {rounds.waits_for && <small>{visible(rounds.waits_for)}</small>}
        {rounds.error && <small class="bad">{visible(rounds.error.message)}</small>}
      </td>
      <td data-label="Round">{whereOf(rounds)}</td>
      <td data-label="Best">
        {best ? `Round ${rounds.best_round}: ${quality.title.toLowerCase()} ${estimateText(best, quality.show)}` : "–"}
      </td>
      <td data-label="Created" title={zone()}>
        {moment(rounds.created_at)}
      </td>
    </tr>
  );
}

/** Such as "2 of 3". */
export const whereOf = ({ rounds, request }: Rounds) => `${rounds.at(-1)!.number} of ${request.num_rounds}`;
