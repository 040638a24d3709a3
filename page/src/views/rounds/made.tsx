import type { ComponentChildren } from "preact";
import type { Round } from "../../api/client";
import { Items, useEvaluation } from "../../parts/items/items";
import { Show } from "../../parts/loading/loading";
import { href, route, setQuery } from "../../parts/route/route";
import { Rows } from "../../parts/rows/rows";

interface Part {
  name: string;
  title: string;
  id: string | null | undefined; // of the object that holds it, once there is one
  show: (id: string) => ComponentChildren;
}

function partsOf({ samples, file, evaluations }: Round): Part[] {
  return [
    { name: "rows", title: "Rows", id: file, show: (id) => <Rows key={id} id={id} /> },
    { name: "samples", title: "Samples and their scores", id: samples, show: (id) => <Judged key={id} id={id} /> },
    { name: "verdicts", title: "Verdicts on the policy", id: evaluations.quality, show: (id) => <Judged key={id} id={id} /> },
  ];
}

/** What one round has made: its training data, the answers that it sampled, and those of its policy, side by side. */
export function Made({ rounds }: { rounds: Round[] }) {
  const { path, query } = route.value;
  const hasMade = rounds.filter((round) => partsOf(round).some((part) => part.id));
  const round = hasMade.find((each) => String(each.number) === query.get("round")) ?? hasMade.at(-1);
  if (!round) return null;
  const parts = partsOf(round).filter((part) => part.id);
  const part = parts.find((each) => each.name === query.get("show")) ?? parts[0]!;
  return (
    <section aria-label="What a round made">
      <div class="heading">
        <h2>What a round made</h2>
        <label>
          Round{" "}
          <select
            value={round.number}
            onChange={(event) => setQuery({ round: event.currentTarget.value, from: null, after: null })}
          >
            {hasMade.map(({ number }) => (
              <option key={number} value={number}>
                {number}
              </option>
            ))}
          </select>
        </label>
      </div>
      <nav class="parts" aria-label="What to show">
        {parts.map(({ name, title }) => (
          <a
            key={name}
            href={href(path, { round: round.number, show: name })}
            aria-current={name === part.name ? "true" : undefined}
          >
            {title}
          </a>
        ))}
      </nav>
      {part.show(part.id!)}
    </section>
  );
}

function Judged({ id }: { id: string }) {
  return (
    <Show of={useEvaluation(id)} list="evaluations">
      {(evaluation) => <Items evaluation={evaluation} />}
    </Show>
  );
}
