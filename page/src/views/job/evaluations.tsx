import { api, ask, type Job } from "../../api/client";
import { useFresh, useLoaded } from "../../parts/loading/loading";
import { mainResult } from "../../parts/results/results";
import { href } from "../../parts/route/route";
import { hasEnded, Status } from "../../parts/status/status";
import { visible } from "../../parts/words/words";

type Asked = Job["x_raydpo"]["evaluations"][number];

const lives = ({ status }: Asked) => status === "waiting" || !hasEnded(status);

/** The evaluations that the job has asked for, newest first. They go on after the job's end, when its stream tells nothing more. */
export function Evaluations({ job, look }: { job: Job; look: () => void }) {
  const { evaluations } = job.x_raydpo;
  useFresh({ isLoading: false, again: look }, hasEnded(job.status) && evaluations.some(lives));
  if (!evaluations.length) return null;
  return (
    <section class="panel">
      <h2>Evaluations</h2>
      {evaluations.map((each) => (
        <Evaluation key={`${each.model} ${each.name}`} of={each} />
      ))}
    </section>
  );
}

function Evaluation({ of: { id, name, model, status, waits_for, error } }: { of: Asked }) {
  const isDone = id !== null && status === "succeeded";
  const found = useLoaded(async (signal) => (isDone ? resultOf(id, signal) : undefined), [id, status]);
  return (
    <div class="model">
      <div>
        <h3>{id ? <a href={href(["evaluations", id])}>{visible(name)}</a> : visible(name)}</h3>
        <a class="id" href={href(["models", model])}>
          {model}
        </a>
        {found.value && <p>{found.value}</p>}
        {found.failure && <p class="bad">{visible(found.failure.message)}</p>}
        {waits_for && <p class="hint">It waits for {visible(waits_for)}</p>}
        {error && <p class="bad">{visible(error.message)}</p>}
      </div>
      <Status of={status} />
    </div>
  );
}

async function resultOf(id: string, signal: AbortSignal): Promise<string | undefined> {
  const params = { path: { evaluation_id: id } };
  const result = mainResult(await ask(api.GET("/v1/x/evaluations/{evaluation_id}", { params, signal })));
  return result && `${result.name} ${result.value} (${result.interval})`;
}
