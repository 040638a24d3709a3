import { api, ask, type Evaluation, type EvaluationItem } from "../../api/client";
import { Save } from "../download/download";
import { Show, useFresh, useLoaded, type Loaded } from "../loading/loading";
import { href, route } from "../route/route";
import { hasEnded } from "../status/status";
import { textOf, type Said } from "../text/text";
import { figure, visible, whole } from "../words/words";

const PAGE = 10;
const OUTCOMES: Record<string, string> = {
  win: "The model's answer is better",
  loss: "The baseline's answer is better",
  tie: "Neither answer is better",
};
const SIDES: Record<string, string> = { first: "the model's", second: "the baseline's", neither: "neither" };

interface Answer {
  text: string;
  num_tokens: number;
  is_finished: boolean;
}

interface Found {
  answer?: Answer;
  answers?: Answer[]; // several samples of one model
  scores?: number[]; // of these
  baseline_answer?: Answer;
  outcome?: string;
  verdicts?: string[];
  [figure: string]: unknown;
}

/** Loads an evaluation, again and again until it has ended. */
export function useEvaluation(id: string): Loaded<Evaluation> {
  const params = { path: { evaluation_id: id } };
  const loaded = useLoaded((signal) => ask(api.GET("/v1/x/evaluations/{evaluation_id}", { params, signal })), [id]);
  useFresh(loaded, !loaded.value || !hasEnded(loaded.value.status));
  return loaded;
}

/** The prompts of an evaluation, each with the answers side by side and what was found about them. */
export function Items({ evaluation }: { evaluation: Evaluation }) {
  const given = route.value.query.get("after");
  const after = given === null ? undefined : Number(given);
  const loaded = useLoaded((signal) => read(evaluation.id, after, signal), [evaluation.id, after]);
  useFresh(loaded, !hasEnded(evaluation.status));
  const at = (number: number | null) => href(route.value.path, { ...Object.fromEntries(route.value.query), after: number });
  return (
    <section aria-label="Items">
      <div class="heading">
        <h2>Items</h2>
        <Save
          path={`/v1/x/evaluations/${encodeURIComponent(evaluation.id)}/content?format=csv`}
          file={`${evaluation.id}.csv`}
          words="Download as CSV"
        />
      </div>
      <Show of={loaded}>
        {(page) => (
          <>
            {page.data.map((item) => (
              <Item key={item.id} item={item} evaluation={evaluation} />
            ))}
            <nav class="pages" aria-label="Pages of items">
              {after !== undefined && <a href={at(null)}>First items</a>}
              {page.has_more && <a href={at(Number(page.last_id))}>Further items</a>}
            </nav>
          </>
        )}
      </Show>
    </section>
  );
}

function read(id: string, after: number | undefined, signal: AbortSignal) {
  const params = { path: { evaluation_id: id }, query: { after, limit: PAGE } };
  return ask(api.GET("/v1/x/evaluations/{evaluation_id}/items", { params, signal }));
}

function Item({ item, evaluation }: { item: EvaluationItem; evaluation: Evaluation }) {
  const found = item.found as Found;
  const baseline = evaluation.request.baseline as string | undefined;
  return (
    <article class="panel row" aria-label={`Line ${item.line}`}>
      <h3>
        Line {whole(item.line)} <Verdict found={found} />
      </h3>
      {item.error && (
        <p class="bad">
          {item.error.code && <b>{item.error.code}: </b>}
          {visible(item.error.message)}
        </p>
      )}
      <h4>Prompt</h4>
      <div class="said">{textOf(item.prompt as Said)}</div>
      <div class="answers">
        {found.answers?.map((answer, at) => (
          <Answered
            key={at}
            model={`answer ${at + 1}`}
            answer={answer}
            isBetter={isBest(found.scores, at)}
          />
        ))}
        {found.answer && <Answered model={evaluation.model} answer={found.answer} isBetter={found.outcome === "win"} />}
        {found.baseline_answer && (
          <Answered model={baseline ?? "baseline"} answer={found.baseline_answer} isBetter={found.outcome === "loss"} />
        )}
        {(item.completions as Said[]).map((said, at) => (
          <Completion key={at} number={at + 1} said={said} isPreferred={evaluation.kind === "preferences" && at === 0} />
        ))}
      </div>
      <Figures found={found} />
    </article>
  );
}

function Verdict({ found }: { found: Found }) {
  if (!found.outcome) return null;
  const [there, back] = found.verdicts ?? [];
  const isSplit = back !== undefined && there !== back;
  return (
    <small>
      {OUTCOMES[found.outcome]}
      {isSplit && `: the judge said ${SIDES[there!]}, and with the answers swapped ${SIDES[back]}`}
    </small>
  );
}

const isBest = (scores: number[] = [], at: number) => scores[at] === Math.max(...scores) && new Set(scores).size > 1;

interface AnsweredProps {
  model: string;
  answer: Answer;
  isBetter: boolean;
}

function Answered({ model, answer, isBetter }: AnsweredProps) {
  return (
    <div class={isBetter ? "best" : undefined}>
      <h4>
        <span class="id">{model}</span> {isBetter && "(better)"}
      </h4>
      <div class="said">{visible(answer.text)}</div>
      {!answer.text && <p class="note">The model wrote nothing.</p>}
      {!answer.is_finished && <p class="hint">Cut off after {whole(answer.num_tokens)} tokens.</p>}
    </div>
  );
}

interface CompletionProps {
  number: number;
  said: Said;
  isPreferred: boolean; // by people
}

/** A completion of the item's row. */
function Completion({ number, said, isPreferred }: CompletionProps) {
  return (
    <div class={isPreferred ? "best" : undefined}>
      <h4>
        completion {number} {isPreferred && "(preferred)"}
      </h4>
      <div class="said">{textOf(said, true)}</div>
    </div>
  );
}

/** Scores, rewards and log-ratios, as far as the evaluation has found them. */
function Figures({ found }: { found: Found }) {
  const told = Object.entries(found).filter(([, value]) => typeof value === "number" || isNumbers(value));
  if (!told.length) return null;
  const shown = (value: unknown) => (Array.isArray(value) ? value.map(figure).join(", ") : figure(Number(value)));
  return <p class="hint">{told.map(([name, value]) => `${name.replaceAll("_", " ")} ${shown(value)}`).join(" · ")}</p>;
}

const isNumbers = (value: unknown) => Array.isArray(value) && value.every((each) => typeof each === "number");
