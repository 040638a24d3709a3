import { api, ask, type Evaluation as EvaluationObject } from "../../api/client";
import { Fact } from "../../parts/fact/fact";
import { Items, useEvaluation } from "../../parts/items/items";
import { Show } from "../../parts/loading/loading";
import { href } from "../../parts/route/route";
import { judgeText } from "../../parts/items/judge";
import { count, moment, percent, zone } from "../../parts/words/words";
import { WorkHeading, type Wish } from "../../parts/work/work";
import { resultsOf } from "../../parts/results/results";

export function Evaluation({ id }: { id: string }) {
  const loaded = useEvaluation(id);
  return (
    <Show of={loaded} list="evaluations">
      {(found) => (
        <>
          <Heading evaluation={found} again={loaded.again} />
          <div class="columns">
            <Facts evaluation={found} />
            {found.results && <Results results={found.results} />}
          </div>
          <Items evaluation={found} />
        </>
      )}
    </Show>
  );
}

interface HeadingProps {
  evaluation: EvaluationObject;
  again: () => void;
}

function Heading({ evaluation, again }: HeadingProps) {
  const { id, kind, status, progress, num_items, num_failed } = evaluation;
  return (
    <>
      <WorkHeading
        title={kind}
        name="the evaluation"
        view="evaluations"
        of={evaluation}
        canPause
        onCancel="It cannot be resumed. What it has found stays."
        onDelete="Its items and results are removed."
        send={(wish) => send(id, wish)}
        again={again}
      />
      {status === "running" && (
        <div class="progress">
          <progress aria-label="evaluating" max={1} value={progress} />
          <span>
            {percent(progress)} of {count(num_items, "item")}
          </span>
        </div>
      )}
      {num_failed > 0 && <p class="warn">{count(num_failed, "item")} failed; the results leave them out.</p>}
    </>
  );
}

function send(id: string, wish: Wish) {
  const params = { path: { evaluation_id: id } };
  if (wish === "delete") return ask(api.DELETE("/v1/x/evaluations/{evaluation_id}", { params }));
  return ask(api.POST(`/v1/x/evaluations/{evaluation_id}/${wish}`, { params }));
}

function Facts({ evaluation }: { evaluation: EvaluationObject }) {
  const { request, model, created_at, estimated_finish, finished_at } = evaluation;
  const models: [string, unknown][] = [
    ["Model", model],
    ["Baseline", request.baseline],
    ["Reference", request.reference],
  ];
  const facts: [string, string | null | undefined][] = [
    ["Judge", judgeText(request.judge)],
    ["Created", moment(created_at)],
    ["Ends", estimated_finish && `about ${moment(estimated_finish)}`],
    ["Ended", finished_at && moment(finished_at)],
  ].map(([name, value]) => [String(name), value ? String(value) : null]);
  return (
    <section class="panel">
      <h2>
        Evaluation <small>times in {zone()}</small>
      </h2>
      <dl>
        {models.map(
          ([name, value]) =>
            typeof value === "string" && (
              <Fact key={name} name={name}>
                <a href={href(["models", value])}>{value}</a>
              </Fact>
            ),
        )}
        {facts.map(
          ([name, value]) =>
            value && (
              <Fact key={name} name={name}>
                {value}
              </Fact>
            ),
        )}
      </dl>
    </section>
  );
}

function Results({ results }: { results: Record<string, unknown> }) {
  return (
    <section class="panel">
      <h2>Results</h2>
      <table>
        <thead>
          <tr>
            <th>Result</th>
            <th>Value</th>
            <th>95 % interval</th>
          </tr>
        </thead>
        <tbody>
          {resultsOf(results).map(({ name, value, interval }) => (
            <tr key={name}>
              <th scope="row">{name}</th>
              <td>{value}</td>
              <td>{interval}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </section>
  );
}
