import type { Job } from "../../api/client";
import { Fact } from "../../parts/fact/fact";

type Values = Record<string, unknown>;

/** What the job's request says, and beside it what the service decided where the request left it open. */
export function Options({ job }: { job: Job }) {
  const request = job.x_raydpo.request as Values;
  const kind = String(job.method.type);
  const asked = hyperparameters(request.method, kind);
  const decided = Object.entries(hyperparameters(job.method, kind)).filter(([name]) => !(name in asked));
  const others = Object.entries({ ...(request.x_raydpo as Values), seed: request.seed });
  return (
    <section class="panel">
      <h2>Options</h2>
      <h3>Asked for, or the default</h3>
      <List values={[["method", kind], ...Object.entries(asked), ...others]} />
      <h3>Decided by the service</h3>
      <List values={decided.map(([name, value]) => [name, value === "auto" ? "not decided yet" : value])} />
    </section>
  );
}

function hyperparameters(method: unknown, kind: string): Values {
  return ((method as Record<string, Values>)[kind]?.hyperparameters ?? {}) as Values;
}

function List({ values }: { values: [string, unknown][] }) {
  return (
    <dl>
      {values.map(([name, value]) => (
        <Fact key={name} name={<code>{name}</code>}>
          {typeof value === "string" ? value : JSON.stringify(value)}
        </Fact>
      ))}
    </dl>
  );
}
