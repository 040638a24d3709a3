import { useEffect, useRef, useState } from "preact/hooks";
import { api, ask, Failure, type CreateFeedback } from "../../api/client";
import { FailureNote } from "../../parts/loading/loading";
import type { Answer, Round } from "./round";

const NAMES = ["A", "B"] as const;
type Ballot = Omit<CreateFeedback, "prompt">;
export type Verdict = "A" | "B" | "tie" | "both bad" | "edit";

export interface Voted {
  verdict: Verdict;
  ids: string[]; // of the stored votes
}

interface Props {
  round: Round;
  onVote: (voted: Voted) => void;
}

/** The buttons with which the reader says which answer is better. */
export function Vote({ round, onVote }: Props) {
  const [failure, setFailure] = useState<Failure>();
  const [isSending, setSending] = useState(false);
  const [edited, setEdited] = useState<0 | 1>();
  const [tried, setTried] = useState<() => void>();

  async function send(verdict: Verdict, votes: Ballot[]) {
    setFailure(undefined);
    setSending(true);
    setTried(() => () => void send(verdict, votes));
    try {
      const ids = [];
      for (const [number, vote] of votes.entries()) ids.push(await store(round, vote, `${verdict}-${number}`));
      onVote({ verdict, ids });
    } catch (error) {
      setFailure(Failure.of(error));
      setSending(false);
    }
  }

  const [first, second] = round.answers;
  const [a, b] = [first.as(round.form), second.as(round.form)];
  const both = { completions: [a, b] };
  if (edited !== undefined) {
    const answer = round.answers[edited];
    return (
      <>
        {failure && <FailureNote failure={failure} again={tried} />}
        <Edit
          name={NAMES[edited]}
          answer={answer}
          isSending={isSending}
          onCancel={() => setEdited(undefined)}
          onSend={(text) => {
            const edit = round.form === "text" ? text : answer.messages(text);
            void send("edit", [{ completions: [answer.as(round.form)], edit }]);
          }}
        />
      </>
    );
  }
  return (
    <>
      {failure && <FailureNote failure={failure} again={tried} />}
      <div class="acts" role="group" aria-label="Your vote">
        {NAMES.map((name, choice) => (
          <button key={name} class="main" disabled={isSending} onClick={() => send(name, [{ ...both, choice }])}>
            {name} is better
          </button>
        ))}
        <button disabled={isSending} onClick={() => send("tie", [{ ...both, ratings: [1, 1] }])}>
          Tie
        </button>
        <button
          disabled={isSending}
          onClick={() => send("both bad", [a, b].map((each) => ({ completions: [each], thumb: "down" })))}
        >
          Both are bad
        </button>
        {NAMES.map((name, index) => (
          <button key={name} disabled={isSending} onClick={() => setEdited(index as 0 | 1)}>
            Improve {name}
          </button>
        ))}
      </div>
    </>
  );
}

async function store(round: Round, vote: Ballot, name: string): Promise<string> {
  const body = { prompt: round.prompt, ...vote };
  const headers = { "idempotency-key": `${round.key}-${name}` };
  return (await ask(api.POST("/v1/x/feedback", { body, headers }))).id;
}

interface EditProps {
  name: string;
  answer: Answer;
  isSending: boolean;
  onSend: (text: string) => void;
  onCancel: () => void;
}

function Edit({ name, answer, isSending, onSend, onCancel }: EditProps) {
  const field = useRef<HTMLTextAreaElement>(null);
  useEffect(() => field.current?.focus(), []);

  function submit(event: SubmitEvent) {
    event.preventDefault();
    onSend(String(new FormData(event.currentTarget as HTMLFormElement).get("text")));
  }
  return (
    <form onSubmit={submit}>
      <label for="improved">Answer {name}, improved</label>
      <textarea id="improved" name="text" rows={8} required ref={field} defaultValue={answer.text.value} />
      <p class="hint">Your text becomes the better answer of a pair, and answer {name} the worse one.</p>
      <div class="acts">
        <button class="main" disabled={isSending}>
          Store the improved text
        </button>
        <button type="button" onClick={onCancel}>
          Back to the votes
        </button>
      </div>
    </form>
  );
}
