import type { Job } from "../../api/client";
import { Fact } from "../../parts/fact/fact";
import { flat, type Values } from "../../parts/settings/settings";

/** What the job's request says, and beside it what the service decided where the request left it open. */
export function Options({ job }: { job: Job }) {
  const request = job.x_raydpo.request as Values;
  const kind = String(job.method.type);
  const asked = hyperparameters(request.method, kind);
  const others = { ...(request.x_raydpo as Values), seed: request.seed };
  const open = Object.entries(hyperparameters(job.method, kind)).filter(([name]) => !(name in asked));
  // What is still open when the job has ended has another option in its place, or was never needed.
  const told = job.finished_at === null ? open : open.filter(([, value]) => value !== "auto");
  const decided = Object.fromEntries(told.map(([name, value]) => [name, value === "auto" ? "not decided yet" : value]));
  return (
    <section class="panel">
      <h2>Options</h2>
      <h3>Asked for, or the default</h3>
      <List values={{ method: kind, ...asked, ...others }} />
      <h3>Decided by the service</h3>
      <List values={decided} />
    </section>
  );
}

function hyperparameters(method: unknown, kind: string): Values {
  return ((method as Record<string, Values>)[kind]?.hyperparameters ?? {}) as Values;
}

function List({ values }: { values: Values }) {
  return (
    <dl>
      {flat(values).map(([name, value]) => (
        <Fact key={name} name={<code>{name}</code>}>
          {value}
        </Fact>
      ))}
    </dl>
  );
}
