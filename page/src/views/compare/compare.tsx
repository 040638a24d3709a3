import { api, ask, type Job } from "../../api/client";
import { Curve, type Line } from "../../parts/curve/curve";
import { looks, rangeOf, Steps, zoom } from "../../parts/curve/steps";
import { Show, useFresh, useLoaded } from "../../parts/loading/loading";
import { href, route } from "../../parts/route/route";
import { CHARTS, isSparse, type Chart } from "../../parts/series/charts";
import { loadSeries, type Range, type Series } from "../../parts/series/series";
import { hasEnded } from "../../parts/status/status";
import { Differences } from "./differences";

const MOST = 6; // jobs, each of a colour of its own

export interface Run {
  job: Job;
  name: string;
  color: number;
  series: Series;
}

/** Curves of several jobs over one another, and what differs between the jobs. */
export function Compare() {
  const { query } = route.value;
  const all = [...new Set((query.get("jobs") ?? "").split(",").filter(Boolean))];
  const ids = all.slice(0, MOST);
  const range = rangeOf(query);
  const runs = useLoaded((signal) => load(ids, range, signal), [ids, range]);
  useFresh(runs, runs.value?.some(({ job }) => !hasEnded(job.status)) ?? false);
  return (
    <>
      <div class="heading">
        <h1>Compare</h1>
        <a class="button" href={href("jobs", { chosen: ids.join(",") })}>
          Choose other jobs
        </a>
      </div>
      {all.length > MOST && <p class="note">The first {MOST} of the chosen jobs are shown.</p>}
      {ids.length < 2 ? (
        <p class="note">
          Choose at least two jobs in the <a href={href("jobs", { chosen: ids.join(",") })}>list of jobs</a>.
        </p>
      ) : (
        <Show of={runs} list="jobs">{(value) => <Runs runs={value} range={range} />}</Show>
      )}
    </>
  );
}

async function load(ids: string[], range: Range, signal: AbortSignal): Promise<Run[]> {
  const found = await Promise.all(
    ids.map(async (id) => {
      const job = ask(api.GET("/v1/fine_tuning/jobs/{job_id}", { params: { path: { job_id: id } }, signal }));
      return { job: await job, series: await loadSeries(id, range, signal) };
    }),
  );
  const suffixes = found.map(({ job }) => job.user_provided_suffix);
  return found.map(({ job, series }, place) => {
    const suffix = job.user_provided_suffix;
    const isAlone = suffix && suffixes.indexOf(suffix) === suffixes.lastIndexOf(suffix);
    const end = `…${job.id.slice(-6)}`;
    return { job, series, color: place + 1, name: isAlone ? suffix : `${suffix ?? ""}${end}` };
  });
}

function Runs({ runs, range }: { runs: Run[]; range: Range }) {
  const steps = [...new Set(runs.flatMap(({ series }) => series.steps))].sort((a, b) => a - b);
  const charts = CHARTS.flatMap((chart) => ofMetrics(chart, runs, steps));
  return (
    <>
      <section aria-label="Curves">
        <Steps steps={steps} bucketSteps={Math.max(...runs.map(({ series }) => series.bucketSteps))} range={range} />
        {charts.length ? (
          <div class="curves">
            {charts.map(({ title, unit, show, lines }) => (
              <Curve key={title} {...{ title, unit, show, lines, steps }} onZoom={zoom} isLabelled {...looks()} />
            ))}
          </div>
        ) : (
          <p class="note">None of these jobs has taken a step in this range. Curves appear with the first step.</p>
        )}
      </section>
      <Differences runs={runs} />
    </>
  );
}

/** Returns a chart for each metric of this chart of one job. */
function ofMetrics(chart: Chart, runs: Run[], steps: number[]) {
  return chart.lines.flatMap(([metric, label]) => {
    const lines = runs.flatMap((run) => lineOf(run, metric, steps));
    const title = chart.lines.length > 1 ? `${chart.title}, ${label}` : chart.title;
    return lines.length ? [{ ...chart, title, lines }] : [];
  });
}

function lineOf({ series, name, color }: Run, metric: string, steps: number[]): Line[] {
  const column = series.columns[metric];
  if (!column) return [];
  const known = new Map(series.steps.map((step, place) => [step, column.mean[place] ?? null]));
  const values = steps.map((step) => known.get(step) ?? null);
  return [{ label: name, color, values, isSparse: isSparse(metric) }];
}
