import { useState } from "preact/hooks";
import { api, ask, Failure, type FeedbackCount, type TrainingFile } from "../../api/client";
import { FailureNote, Show, type Loaded } from "../../parts/loading/loading";
import { href } from "../../parts/route/route";
import { count, whole } from "../../parts/words/words";

const KINDS = {
  pairs: "Pairs: a choice or an improved text",
  unpaired: "Thumbs: one answer, good or bad",
  ratings: "Ratings, ties among them",
};
const LEAST = 10; // rows of a training file

/** How many votes the project has, with a button that makes a training file of those of a kind. */
export function Votes({ counts }: { counts: Loaded<FeedbackCount[]> }) {
  return (
    <section class="panel">
      <h2>Votes so far</h2>
      <Show of={counts}>
        {(kinds) =>
          kinds.length ? (
            kinds.map((each) => <Count key={`${each.kind} ${each.form}`} of={each} />)
          ) : (
            <p class="note">There are no votes yet. Ask, vote, and make a training file of the votes.</p>
          )
        }
      </Show>
    </section>
  );
}

function Count({ of: { kind, form, num_votes } }: { of: FeedbackCount }) {
  const [made, setMade] = useState<TrainingFile>();
  const [failure, setFailure] = useState<Failure>();
  const [isBusy, setBusy] = useState(false);

  async function make() {
    setFailure(undefined);
    setBusy(true);
    try {
      setMade(await ask(api.POST("/v1/x/feedback/files", { body: { kind, form } })));
    } catch (error) {
      setFailure(Failure.of(error));
    }
    setBusy(false);
  }

  return (
    <div class="model">
      <div>
        <h3>{KINDS[kind]}</h3>
        <span>
          {count(num_votes, "vote")}
          {form === "text" && " on plain text"}
        </span>
        {num_votes < LEAST && <small> A job needs at least {LEAST}.</small>}
      </div>
      <button onClick={make} disabled={isBusy} aria-label={`Make a training file: ${KINDS[kind]}`}>
        {isBusy ? "Making it…" : "Make a training file"}
      </button>
      {failure && <FailureNote failure={failure} again={make} />}
      <div role="status" class="made">
        {made && (
          <>
            <a href={href(["data", made.id])}>
              <code>{made.id}</code>
            </a>{" "}
            holds {whole(made.x_raydpo.report?.num_rows ?? num_votes)} votes.{" "}
            <a href={href(["jobs", "new"], { training_file: made.id })}>Train on it</a>
          </>
        )}
      </div>
    </div>
  );
}
