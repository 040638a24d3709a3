import { useEffect, useRef, useState } from "preact/hooks";
import { api, ask, Failure, type CreateRewards, type Judged, type Model, type Rewards as Found } from "../../api/client";
import { whenLoaded } from "../../api/waiting";
import { FailureNote, Show, useLoaded } from "../../parts/loading/loading";
import { href } from "../../parts/route/route";
import { figure, percent, visible, whole } from "../../parts/words/words";

const MOST_ANSWERS = 64; // of one prompt, as the API takes them

/** Scores answers that the reader writes: which one the model prefers, and by how much. The texts stay in the tab. */
export function Rewards({ id }: { id: string }) {
  const models = useLoaded((signal) => load(id, signal), [id]);
  return (
    <>
      <div class="heading">
        <div class="title">
          <h1>Score answers</h1>
          <small class="id">
            <a href={href(["models", id])}>{id}</a>
          </small>
        </div>
      </div>
      <Show of={models} list="models">
        {({ model, others }) => <Scoring model={model} others={others} />}
      </Show>
    </>
  );
}

interface Known {
  model: Model;
  others: Model[]; // that can be the reference
}

async function load(id: string, signal: AbortSignal): Promise<Known> {
  const [model, all] = await Promise.all([
    ask(api.GET("/v1/models/{model_id}", { params: { path: { model_id: id } }, signal })),
    ask(api.GET("/v1/models", { params: { query: { limit: 1000 } }, signal })),
  ]);
  return { model, others: all.data.filter((other) => other.x_raydpo.kind === "policy" && other.id !== id) };
}

interface Scored {
  answers: string[];
  rewards: Found;
}

function Scoring({ model, others }: Known) {
  const [numAnswers, setNumAnswers] = useState(2);
  const [scored, setScored] = useState<Scored>();
  const { failure, isRunning, run, stop } = useAsking();
  const numbers = Array.from({ length: numAnswers }, (_, index) => index);

  async function send(event: SubmitEvent) {
    event.preventDefault();
    const fields = new FormData(event.currentTarget as HTMLFormElement);
    const prompt = String(fields.get("prompt"));
    const answers = numbers.map((number) => String(fields.get(`answer-${number}`)));
    const [reference, beta] = [String(fields.get("reference") ?? ""), String(fields.get("beta") ?? "")];
    setScored(undefined);
    const rewards = await run({
      model: model.id,
      ...(reference && { reference }),
      ...(beta && { beta: Number(beta) }),
      rows: [{ prompt: [message("user", prompt)], completions: answers.map((each) => [message("assistant", each)]) }],
    });
    if (rewards) setScored({ answers, rewards });
  }

  return (
    <>
      <form class="panel" onSubmit={send}>
        <p>{WORDS[model.x_raydpo.kind]}</p>
        <label for="prompt">Prompt</label>
        <textarea id="prompt" name="prompt" rows={3} required />
        {numbers.map((number) => (
          <div key={number}>
            <label for={`answer-${number}`}>Answer {number + 1}</label>
            <textarea id={`answer-${number}`} name={`answer-${number}`} rows={2} required />
          </div>
        ))}
        <div class="acts">
          <button type="button" disabled={numAnswers === MOST_ANSWERS} onClick={() => setNumAnswers(numAnswers + 1)}>
            One more answer
          </button>
          <button type="button" disabled={numAnswers === 1} onClick={() => setNumAnswers(numAnswers - 1)}>
            One answer less
          </button>
        </div>
        {model.x_raydpo.kind === "policy" && <Compared model={model} others={others} />}
        <div class="acts">
          <button class="main" disabled={isRunning}>
            {isRunning ? "It scores…" : "Score"}
          </button>
          {isRunning && (
            <button type="button" onClick={stop}>
              Stop
            </button>
          )}
        </div>
        <p class="hint">
          <code>raydpo rewards FILE --model {model.id}</code> scores a whole file, and says how often the model agrees with it.
        </p>
      </form>
      {failure && (isRunning ? <p class="note">{visible(failure.message)}</p> : <FailureNote failure={failure} />)}
      {scored && <Results scored={scored} />}
    </>
  );
}

const message = (role: string, content: string) => ({ role, content });

const WORDS = {
  policy:
    "The reward of an answer is β times how much more likely, in nats, the policy is to write it than its reference is.",
  reward: "The reward of an answer is the output of the reward model.",
};

/** What a policy is compared with. Its job knows both, unless it learned without a reference. */
function Compared({ model, others }: Known) {
  const isBase = !model.x_raydpo.job;
  return (
    <div class="fields">
      <div>
        <label for="reference">Reference</label>
        <select id="reference" name="reference" required={isBase}>
          <option value="">{isBase ? "choose a model" : "that of its job"}</option>
          {others.map((other) => (
            <option>{other.id}</option>
          ))}
        </select>
      </div>
      <div>
        <label for="beta">β</label>
        <input id="beta" name="beta" type="number" min={0} max={100} step="any" required={isBase} placeholder={isBase ? "0.1" : "that of its job"} />
      </div>
    </div>
  );
}

function Results({ scored: { answers, rewards } }: { scored: Scored }) {
  const { winner, completions } = rewards.data[0]!;
  const isImplicit = rewards.reference !== null;
  return (
    <section class="panel" aria-label="Rewards">
      <table class="list">
        <thead>
          <tr>
            <th>Answer</th>
            <th>Reward</th>
            <th>Preferred</th>
            {isImplicit && <th>Log-ratio</th>}
            <th>Tokens</th>
          </tr>
        </thead>
        <tbody>
          {completions.map((each) => (
            <Row key={each.index} judged={each} answer={answers[each.index]!} isBest={each.index === winner} />
          ))}
        </tbody>
      </table>
      <p class="hint">
        {isImplicit && `Compared with ${rewards.reference}, β is ${figure(rewards.beta!)}. `}
        “Preferred” is the probability that an answer is better than all others here. Rewards of different prompts cannot be
        compared.
      </p>
    </section>
  );
}

function Row({ judged, answer, isBest }: { judged: Judged; answer: string; isBest: boolean }) {
  return (
    <tr>
      <th scope="row">
        <div class="said">{visible(answer)}</div>
        {isBest && <small class="good">the best one</small>}
      </th>
      <td data-label="Reward">{figure(judged.reward)}</td>
      <td data-label="Preferred">{percent(judged.probability)}</td>
      {judged.log_ratio !== null && <td data-label="Log-ratio">{figure(judged.log_ratio)} nats</td>}
      <td data-label="Tokens">{whole(judged.num_tokens)}</td>
    </tr>
  );
}

/** Asks until the rewards are there: models that load are asked again, and until then `failure` says what they wait for. */
function useAsking() {
  const [failure, setFailure] = useState<Failure>();
  const [isRunning, setRunning] = useState(false);
  const leaving = useRef<AbortController>(undefined);
  useEffect(() => () => leaving.current?.abort(), []);

  async function run(body: CreateRewards): Promise<Found | undefined> {
    const { signal } = (leaving.current = new AbortController());
    setFailure(undefined);
    setRunning(true);
    try {
      const found = await whenLoaded(() => ask(api.POST("/v1/x/rewards", { body, signal })), signal, setFailure);
      setFailure(undefined);
      return found;
    } catch (error) {
      setFailure(signal.aborted ? undefined : Failure.of(error));
      return undefined;
    } finally {
      setRunning(false);
    }
  }

  return { failure, isRunning, run, stop: () => leaving.current?.abort() };
}
