import { api, ask, type Frontier as FrontierObject, type Sweep as SweepObject, type Trial } from "../../api/client";
import { Show, useFresh, useLoaded } from "../../parts/loading/loading";
import { href } from "../../parts/route/route";
import { hasEnded, Status } from "../../parts/status/status";
import { figure, moment, visible, zone } from "../../parts/words/words";
import { WorkHeading, type Wish } from "../../parts/work/work";
import { Frontier } from "./frontier";
import { shortNames, text, type Names } from "./names";
import { trialsOf } from "./sweeps";

interface Found {
  sweep: SweepObject;
  trials: Trial[];
  frontier?: FrontierObject; // absent if the sweep has no evaluations of which to draw one
}

export function Sweep({ id }: { id: string }) {
  const loaded = useLoaded((signal) => load(id, signal), [id]);
  useFresh(loaded, !loaded.value || !hasEnded(loaded.value.sweep.status));
  return (
    <Show of={loaded} list="sweeps">
      {({ sweep, trials, frontier }) => {
        const names = shortNames(Object.keys(sweep.request.parameters as object));
        return (
          <>
            <Heading sweep={sweep} again={loaded.again} />
            {frontier && <Frontier frontier={frontier} names={names} />}
            <Trials sweep={sweep} trials={trials} names={names} />
          </>
        );
      }}
    </Show>
  );
}

async function load(id: string, signal: AbortSignal): Promise<Found> {
  const params = { path: { sweep_id: id } };
  const sweep = await ask(api.GET("/v1/x/sweeps/{sweep_id}", { params, signal }));
  const [trials, frontier] = await Promise.all([
    allTrials(id, signal),
    hasAxes(sweep) ? ask(api.GET("/v1/x/sweeps/{sweep_id}/frontier", { params, signal })) : undefined,
  ]);
  return { sweep, trials, frontier };
}

function hasAxes({ request }: SweepObject): boolean {
  const kinds = Object.values(request.evaluations as Record<string, { kind: string }>).map((each) => each.kind);
  return kinds.includes("drift") && kinds.some((kind) => kind === "score" || kind === "compare");
}

async function allTrials(id: string, signal: AbortSignal): Promise<Trial[]> {
  const found: Trial[] = [];
  for (;;) {
    const last = found.at(-1);
    const params = { path: { sweep_id: id }, query: { limit: 100, after: last && Number(last.id) } };
    const page = await ask(api.GET("/v1/x/sweeps/{sweep_id}/trials", { params, signal }));
    found.push(...page.data);
    if (!page.has_more) return found;
  }
}

interface HeadingProps {
  sweep: SweepObject;
  again: () => void;
}

function Heading({ sweep, again }: HeadingProps) {
  return (
    <>
      <WorkHeading
        title="Sweep"
        name="the sweep"
        view="sweeps"
        of={sweep}
        onCancel="Its jobs and evaluations are cancelled with it. What they have made stays."
        onDelete="Its jobs, policies and evaluations stay."
        send={(wish) => send(sweep.id, wish)}
        again={again}
      />
      <p>
        Trials: {trialsOf(sweep)}. Created {moment(sweep.created_at)}
        {sweep.finished_at && `, ended ${moment(sweep.finished_at)}`} <small>({zone()})</small>.
      </p>
    </>
  );
}

function send(id: string, wish: Wish) {
  const params = { path: { sweep_id: id } };
  if (wish === "delete") return ask(api.DELETE("/v1/x/sweeps/{sweep_id}", { params }));
  return ask(api.POST("/v1/x/sweeps/{sweep_id}/cancel", { params }));
}

interface TrialsProps {
  sweep: SweepObject;
  trials: Trial[];
  names: Names;
}

/** The trials, the best first; those without a value come last, in the order in which they began. */
function Trials({ sweep, trials, names }: TrialsProps) {
  const metric = sweep.request.metric as { name: string; goal: string } | undefined;
  const sign = metric?.goal === "minimize" ? 1 : -1;
  const rank = ({ value }: Trial) => (value === null ? Infinity : sign * value);
  const sorted = metric ? [...trials].sort((a, b) => rank(a) - rank(b) || Number(a.id) - Number(b.id)) : trials;
  if (!trials.length) return <p class="note">No trial has begun yet.</p>;
  return (
    <table class="list">
      <thead>
        <tr>
          <th>Trial</th>
          {[...names.values()].map((name) => (
            <th key={name}>{name}</th>
          ))}
          {metric && <th>{metric.name}</th>}
          <th>Status</th>
          <th>Evaluations</th>
          <th>Policy</th>
        </tr>
      </thead>
      <tbody>
        {sorted.map((trial) => (
          <tr key={trial.id}>
            <th scope="row">
              {trial.job_id ? <a href={href(["jobs", trial.job_id])}>Trial {trial.id}</a> : `Trial ${trial.id}`}
              {trial.id === sweep.best?.id && <small>the best</small>}
            </th>
            {[...names].map(([path, name]) => (
              <td key={path} data-label={name}>
                {text(trial.parameters[path])}
              </td>
            ))}
            {metric && <td data-label={metric.name}>{trial.value === null ? "–" : figure(trial.value)}</td>}
            <td data-label="Status">
              <Status of={trial.status} />
              {trial.error && <small class="bad">{visible(trial.error.message)}</small>}
            </td>
            <td data-label="Evaluations">
              {Object.entries(trial.evaluations).map(([name, id]) => (
                <div key={name}>
                  <a href={href(["evaluations", id])}>{name}</a>
                </div>
              ))}
            </td>
            <td data-label="Policy">{trial.model && <a href={href(["models", trial.model])}>{trial.model}</a>}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
