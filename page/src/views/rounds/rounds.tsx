import { api, ask, type Round, type Rounds as RoundsObject } from "../../api/client";
import { Fact } from "../../parts/fact/fact";
import { judgeText } from "../../parts/items/judge";
import { Show, useFresh, useLoaded } from "../../parts/loading/loading";
import { href } from "../../parts/route/route";
import { hasEnded } from "../../parts/status/status";
import { count, moment, visible, zone } from "../../parts/words/words";
import { WorkHeading, type Wish } from "../../parts/work/work";
import { whereOf } from "./all-rounds";
import { Curves } from "./curves";
import { estimateText, qualityOf } from "./estimates";
import { Made } from "./made";

const STAGES: Record<NonNullable<RoundsObject["stage"]>, string> = {
  samples: "begins to sample answers",
  file: "samples and scores answers",
  job: "creates its job",
  model: "trains its policy",
  evaluations: "begins to evaluate its policy",
  results: "evaluates its policy",
  next: "ends",
};
const END_REASONS: Record<NonNullable<RoundsObject["end_reason"]>, string> = {
  num_rounds: "All rounds are done.",
  not_better: "The last policy was not better than the best one before.",
  too_few_rows: "The last answers made too few rows for a job: the judge no longer tells them apart.",
};

/** Rounds of one policy: how each of its successors does, and what each round made. */
export function Rounds({ id }: { id: string }) {
  const loaded = useLoaded((signal) => retrieve(id, signal), [id]);
  useFresh(loaded, !loaded.value || !hasEnded(loaded.value.status));
  return (
    <Show of={loaded} list="rounds">
      {(found) => (
        <>
          <Heading rounds={found} again={loaded.again} />
          <Curves rounds={found.rounds} />
          <Table rounds={found} />
          <Facts request={found.request} />
          <Made rounds={found.rounds} />
        </>
      )}
    </Show>
  );
}

function retrieve(id: string, signal: AbortSignal) {
  return ask(api.GET("/v1/x/rounds/{rounds_id}", { params: { path: { rounds_id: id } }, signal }));
}

interface HeadingProps {
  rounds: RoundsObject;
  again: () => void;
}

function Heading({ rounds, again }: HeadingProps) {
  const { id, stage, end_reason, created_at, finished_at } = rounds;
  return (
    <>
      <WorkHeading
        title="Rounds"
        name="the rounds"
        view="rounds"
        of={rounds}
        canPause
        onCancel="Their job or evaluations that are under way are cancelled with them. What they have made stays."
        onDelete="Their files, jobs, policies and evaluations stay."
        send={(wish) => send(id, wish)}
        again={again}
      />
      <p>
        Round {whereOf(rounds)}
        {stage && ` ${STAGES[stage]}`}. {end_reason && END_REASONS[end_reason]} Created {moment(created_at)}
        {finished_at && `, ended ${moment(finished_at)}`} <small>({zone()})</small>.
      </p>
    </>
  );
}

function send(id: string, wish: Wish) {
  const params = { path: { rounds_id: id } };
  if (wish === "delete") return ask(api.DELETE("/v1/x/rounds/{rounds_id}", { params }));
  return ask(api.POST(`/v1/x/rounds/{rounds_id}/${wish}`, { params }));
}

function Table({ rounds: { rounds, best_round } }: { rounds: RoundsObject }) {
  const quality = qualityOf(rounds);
  return (
    <table class="list">
      <thead>
        <tr>
          <th>Round</th>
          <th>{quality.title}</th>
          <th>KL</th>
          <th>Rows</th>
          <th>Job</th>
          <th>Policy</th>
          <th>Evaluations</th>
        </tr>
      </thead>
      <tbody>
        {rounds.map((round) => {
          const found = round[quality.name];
          return (
            <tr key={round.number}>
              <th scope="row">
                {round.number ? `Round ${round.number}` : "First policy"}
                {found && round.number === best_round && <small>the best</small>}
              </th>
              <td data-label={quality.title}>
                {found ? estimateText(found, quality.show) : "–"}
                {Boolean(round.num_failed) && <small class="warn">{count(round.num_failed!, "item")} failed</small>}
              </td>
              <td data-label="KL">{round.kl ? estimateText(round.kl) : "–"}</td>
              <td data-label="Rows">
                <RowsOf round={round} />
              </td>
              <td data-label="Job">{round.job && <a href={href(["jobs", round.job])}>{round.job}</a>}</td>
              <td data-label="Policy">{round.model && <a href={href(["models", round.model])}>{round.model}</a>}</td>
              <td data-label="Evaluations">
                <Evaluations round={round} />
              </td>
            </tr>
          );
        })}
      </tbody>
    </table>
  );
}

function RowsOf({ round: { rows, file } }: { round: Round }) {
  if (!rows) return <>–</>;
  const told = count(rows.num_rows!, "row");
  const left = Object.entries(rows).filter(([name, number]) => number && LEFT_OUT[name]);
  return (
    <>
      {file ? <a href={href(["data", file])}>{told}</a> : told}
      {left.length > 0 && <small>left out: {left.map(([name, number]) => count(number, ...LEFT_OUT[name]!)).join(", ")}</small>}
    </>
  );
}

const LEFT_OUT: Record<string, [one: string, many?: string]> = {
  num_failed: ["prompt without answers", "prompts without answers"],
  num_unfinished: ["unfinished answer"],
  num_duplicates: ["duplicate"],
  num_ties: ["tie"],
  num_repeated_rows: ["repeated row"],
};

function Evaluations({ round: { samples, evaluations } }: { round: Round }) {
  return (
    <>
      {Object.entries({ ...(samples && { samples }), ...evaluations }).map(([name, id]) => (
        <div key={name}>
          <a href={href(["evaluations", id])}>{name}</a>
        </div>
      ))}
    </>
  );
}

/** What was asked for. */
function Facts({ request }: { request: RoundsObject["request"] }) {
  const { selection, job } = request as { selection?: { type: string }; job?: { method?: { type?: string } } };
  const facts: [string, unknown][] = [
    ["First policy", request.model],
    ["Judge", judgeText(request.judge)],
    ["Answers to each prompt", request.num_samples],
    ["Selection", selection?.type],
    ["Method", job?.method?.type],
    ["Each job starts from", `the ${request.start} policy`],
    ["Its reference is", `the ${request.reference} policy`],
    ["Ends early", request.stop_if_not_better ? "if a policy is not better" : null],
  ];
  return (
    <section class="panel">
      <h2>What was asked for</h2>
      <dl>
        {facts.map(
          ([name, value]) =>
            value != null && (
              <Fact key={name} name={name}>
                {visible(String(value))}
              </Fact>
            ),
        )}
      </dl>
    </section>
  );
}
