import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import type { Question } from "../../api/answer";
import { api, ask, Failure, type FeedbackCount, type Model } from "../../api/client";
import { FailureNote, Show, useLoaded } from "../../parts/loading/loading";
import { NoModels } from "../../parts/no-models/no-models";
import { route, setQuery } from "../../parts/route/route";
import { visible } from "../../parts/words/words";
import { Answers } from "./answers";
import { Round } from "./round";
import { Vote, type Voted } from "./vote";
import { Votes } from "./votes";

export function Ask() {
  const models = useLoaded(policies, []);
  const counts = useLoaded<FeedbackCount[]>(countVotes, []);
  return (
    <>
      <div class="heading">
        <h1>Ask two policies</h1>
      </div>
      <Show of={models}>
        {(known) =>
          known.length ? (
            <Asking models={known} onCount={counts.again} />
          ) : (
            <NoModels />
          )
        }
      </Show>
      <Votes counts={counts} />
    </>
  );
}

async function policies(signal: AbortSignal): Promise<Model[]> {
  const { data } = await ask(api.GET("/v1/models", { params: { query: { limit: 1000 } }, signal }));
  return data.filter((model) => model.x_raydpo.kind === "policy");
}

async function countVotes(signal: AbortSignal): Promise<FeedbackCount[]> {
  return (await ask(api.GET("/v1/x/feedback", { params: { query: { limit: 1 } }, signal }))).counts;
}

/** The newest policy and its base, unless the address names others. */
function chosen(models: Model[], query: URLSearchParams): [string, string] {
  const first = models.find((model) => model.x_raydpo.job) ?? models[0]!;
  const second = models.find((model) => model.id === first.x_raydpo.root && model !== first) ?? models[1] ?? first;
  return [query.get("a") || first.id, query.get("b") || second.id];
}

function Asking({ models, onCount }: { models: Model[]; onCount: () => void }) {
  const { query } = route.value;
  const pair = chosen(models, query);
  const isBlind = query.get("names") !== "shown";
  const [round, setRound] = useState<Round>();
  const [voted, setVoted] = useState<Voted>();
  useEffect(() => () => round?.stop(), [round]);

  function start(question: Question) {
    const next = new Round(question, pair, isBlind);
    setVoted(undefined);
    setRound(next);
    next.run();
  }

  const isRunning = round !== undefined && !round.isOver;
  return (
    <>
      <form class="panel" onSubmit={(event) => submit(event, start)}>
        <div class="fields">
          <Choice label="First model" name="a" models={models} value={pair[0]} />
          <Choice label="Second model" name="b" models={models} value={pair[1]} />
        </div>
        <label class="check">
          <input
            type="checkbox"
            checked={isBlind}
            onChange={(event) => setQuery({ names: event.currentTarget.checked ? null : "shown" }, { replaces: true })}
          />{" "}
          Hide until the vote which model gave which answer, and shuffle them
        </label>
        <label for="prompt">Prompt</label>
        <textarea id="prompt" name="prompt" rows={4} required onKeyDown={submitByKey} aria-describedby="prompt-hint" />
        <p class="hint" id="prompt-hint">
          Ctrl and Enter ask.
        </p>
        <details>
          <summary>System prompt and sampling</summary>
          <label for="system">System prompt</label>
          <textarea id="system" name="system" rows={2} />
          <div class="fields">
            <Amount name="temperature" label="Temperature" max={2} step={0.1} hint="empty: the model's own" />
            <Amount name="max_tokens" label="Most tokens" min={1} step={1} hint="empty: as many as fit" />
          </div>
        </details>
        <div class="acts">
          <button class="main" disabled={isRunning}>
            {isRunning ? "They answer…" : "Ask both"}
          </button>
          {isRunning && (
            <button type="button" onClick={() => round.stop()}>
              Stop
            </button>
          )}
        </div>
      </form>
      {round && <Answers round={round} areNamed={!round.isBlind || voted !== undefined || (round.isOver && !round.isComplete)} />}
      {round && <Verdict key={round.key} round={round} voted={voted} setVoted={setVoted} onCount={onCount} />}
    </>
  );
}

interface VerdictProps {
  round: Round;
  voted?: Voted;
  setVoted: (voted: Voted | undefined) => void;
  onCount: () => void;
}

/** What the reader thinks of the answers: the buttons, then what became of the vote. */
function Verdict({ round, voted, setVoted, onCount }: VerdictProps) {
  const [failure, setFailure] = useState<Failure>();
  const [isTakenBack, setTakenBack] = useState(false);

  async function takeBack(ids: string[]) {
    setFailure(undefined);
    try {
      for (const id of ids) await remove(id);
      setTakenBack(true);
      onCount();
    } catch (error) {
      setFailure(Failure.of(error));
    }
  }

  const place = useRef<HTMLParagraphElement>(null);
  useLayoutEffect(() => {
    const hasNone = document.activeElement === document.body; // the button that had the focus is gone
    if (voted && hasNone) place.current?.focus();
  }, [voted]);
  return (
    <section class="panel" aria-label="Vote">
      <p ref={place} tabIndex={-1} role="status">
        {isTakenBack ? "The vote is taken back." : wordsOf(round, voted)}
      </p>
      {failure && <FailureNote failure={failure} />}
      {!voted && round.isComplete && (
        <Vote
          round={round}
          onVote={(given) => {
            setVoted(given);
            onCount();
          }}
        />
      )}
      {voted && !isTakenBack && <button onClick={() => takeBack(voted.ids)}>Take the vote back</button>}
    </section>
  );
}

function wordsOf(round: Round, voted: Voted | undefined): string {
  if (voted) {
    const [a, b] = round.answers.map((answer) => answer.model);
    return `Your vote is stored: ${said(voted)}. A was ${a}, B was ${b}.`;
  }
  if (!round.isOver) return "Both models are asked. You vote when both answers are there.";
  if (!round.isComplete) return "An answer is missing, so there is nothing to compare. Ask again, or choose another model.";
  return "Both answers are there. Which one is better?";
}

function said({ verdict }: Voted): string {
  if (verdict === "edit") return "your text is the better answer";
  if (verdict === "tie" || verdict === "both bad") return verdict;
  return `${verdict} is better`;
}

async function remove(id: string): Promise<void> {
  const { error, response } = await api.DELETE("/v1/x/feedback/{feedback_id}", { params: { path: { feedback_id: id } } });
  if (!response.ok) throw Failure.answered(response.status, error);
}

// --- fields --------------------------------------------------------------------------------

function submit(event: SubmitEvent, start: (question: Question) => void) {
  event.preventDefault();
  const fields = new FormData(event.currentTarget as HTMLFormElement);
  const text = (name: string) => String(fields.get(name) ?? "").trim();
  const number = (name: string) => (text(name) ? Number(text(name)) : null);
  start({
    system: text("system"),
    prompt: text("prompt"),
    temperature: number("temperature"),
    maxTokens: number("max_tokens"),
  });
}

function submitByKey(event: KeyboardEvent) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) (event.currentTarget as HTMLTextAreaElement).form!.requestSubmit();
}

interface ChoiceProps {
  label: string;
  name: "a" | "b";
  models: Model[];
  value: string;
}

function Choice({ label, name, models, value }: ChoiceProps) {
  const groups = { "Trained policies": true, "Base models": false };
  const isListed = models.some((model) => model.id === value);
  return (
    <div>
      <label for={name}>{label}</label>
      <select
        id={name}
        value={value}
        aria-describedby={isListed ? undefined : `about-${name}`}
        onChange={(event) => setQuery({ [name]: event.currentTarget.value }, { replaces: true })}
      >
        {!isListed && <option value={value}>{visible(value)}</option>}
        {Object.entries(groups).map(([title, isTrained]) => {
          const group = models.filter((model) => Boolean(model.x_raydpo.job) === isTrained);
          return (
            group.length > 0 && (
              <optgroup label={title}>
                {group.map((model) => (
                  <option>{model.id}</option>
                ))}
              </optgroup>
            )
          );
        })}
      </select>
      <div id={`about-${name}`}>{!isListed && <Unlisted key={value} id={value} />}</div>
    </div>
  );
}

/** Says why the model that the address names is not offered. Of many models only the first are listed. */
function Unlisted({ id }: { id: string }) {
  const { value, failure } = useLoaded(
    (signal) => ask(api.GET("/v1/models/{model_id}", { params: { path: { model_id: id } }, signal })),
    [id],
  );
  if (failure) return <FailureNote failure={failure} />;
  if (!value || value.x_raydpo.kind === "policy") return null;
  return <p class="bad">The model {visible(id)} is a reward model, which writes no answers. Choose another one.</p>;
}

interface AmountProps {
  name: string;
  label: string;
  hint: string;
  min?: number;
  max?: number;
  step: number;
}

function Amount({ name, label, hint, min = 0, max, step }: AmountProps) {
  return (
    <div>
      <label for={name}>{label}</label>
      <input id={name} name={name} type="number" min={min} max={max} step={step} placeholder={hint} />
    </div>
  );
}
