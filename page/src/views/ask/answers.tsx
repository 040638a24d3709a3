import { FailureNote } from "../../parts/loading/loading";
import type { Answer, Round } from "./round";
import { visible } from "../../parts/words/words";

export function Answers({ round, areNamed }: { round: Round; areNamed: boolean }) {
  return (
    <div class="answers">
      {round.answers.map((answer, index) => (
        <Answered key={index} name={"AB"[index]!} answer={answer} isNamed={areNamed} round={round} />
      ))}
    </div>
  );
}

interface Props {
  name: string;
  answer: Answer;
  isNamed: boolean;
  round: Round;
}

function Answered({ name, answer, isNamed, round }: Props) {
  const state = answer.state.value;
  const failure = answer.failure.value;
  return (
    <section class="panel" aria-label={`Answer ${name}`} aria-busy={state === "waiting" || state === "writing"}>
      <h2>
        Answer {name} {isNamed && <small class="id">{answer.model}</small>}
      </h2>
      {answer.thought.value && (
        <details class="thought">
          <summary>Thoughts</summary>
          <div class="said">{visible(answer.thought.value)}</div>
        </details>
      )}
      <div class="said">{visible(answer.text.value)}</div>
      {state === "complete" && !answer.text.value && <p class="note">The model wrote nothing.</p>}
      {state === "waiting" && <Waiting words={isNamed ? failure?.message : undefined} />}
      {answer.end.value === "length" && (
        <p class="hint">The answer was cut off at the most tokens{round.question.maxTokens ? ` (${round.question.maxTokens})` : ""}.</p>
      )}
      {state === "failed" && failure && <FailureNote failure={failure} />}
    </section>
  );
}

/** While the names are hidden, so is the reason, because it names the model. */
function Waiting({ words }: { words?: string }) {
  return <p class="note">{words ?? "Waiting for the model. If it is not loaded, this takes a while."}</p>;
}
