import { useState } from "preact/hooks";
import { api, ask, Failure, type Evaluation as EvaluationObject } from "../../api/client";
import { AskFirst } from "../../parts/dialog/dialog";
import { Fact } from "../../parts/fact/fact";
import { FailureNote, Show, useFresh, useLoaded } from "../../parts/loading/loading";
import { href } from "../../parts/route/route";
import { hasEnded, Status } from "../../parts/status/status";
import { count, moment, percent, visible, zone } from "../../parts/words/words";
import { Items } from "./items";
import { judgeOf, resultsOf } from "./results";

export function Evaluation({ id }: { id: string }) {
  const loaded = useLoaded((signal) => retrieve(id, signal), [id]);
  const evaluation = loaded.value;
  useFresh(loaded, !evaluation || !hasEnded(evaluation.status));
  return (
    <Show of={loaded}>
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

function retrieve(id: string, signal: AbortSignal) {
  return ask(api.GET("/v1/x/evaluations/{evaluation_id}", { params: { path: { evaluation_id: id } }, signal }));
}

interface HeadingProps {
  evaluation: EvaluationObject;
  again: () => void;
}

function Heading({ evaluation, again }: HeadingProps) {
  const [failure, setFailure] = useState<Failure>();
  const { id, kind, status, progress, num_items, num_failed, waits_for, error } = evaluation;

  async function cancel() {
    setFailure(undefined);
    try {
      await ask(api.POST("/v1/x/evaluations/{evaluation_id}/cancel", { params: { path: { evaluation_id: id } } }));
    } catch (thrown) {
      setFailure(Failure.of(thrown));
    }
    again();
  }

  return (
    <>
      <div class="heading">
        <div class="title">
          <h1>{kind}</h1>
          <small class="id">{id}</small>
        </div>
        <Status of={status} />
        {!hasEnded(status) && (
          <div class="acts">
            <AskFirst
              act="Cancel the evaluation"
              question="Cancel this evaluation?"
              refusal="Keep it"
              onAgree={() => void cancel()}
            >
              <p>It cannot be resumed. What it has found stays.</p>
            </AskFirst>
          </div>
        )}
      </div>
      {failure && <FailureNote failure={failure} />}
      {status === "running" && (
        <div class="progress">
          <progress aria-label="evaluating" max={1} value={progress} />
          <span>
            {percent(progress)} of {count(num_items, "item")}
          </span>
        </div>
      )}
      {waits_for && <p>{visible(waits_for)}</p>}
      {num_failed > 0 && <p class="warn">{count(num_failed, "item")} failed; the results leave them out.</p>}
      {error && (
        <div class="failure">
          <p>
            <b>{error.code}</b>: {visible(error.message)}
          </p>
        </div>
      )}
    </>
  );
}

function Facts({ evaluation }: { evaluation: EvaluationObject }) {
  const { request, model, created_at, estimated_finish, finished_at } = evaluation;
  const models: [string, unknown][] = [
    ["Model", model],
    ["Baseline", request.baseline],
    ["Reference", request.reference],
  ];
  const facts: [string, string | null | undefined][] = [
    ["Judge", judgeOf(evaluation)],
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
