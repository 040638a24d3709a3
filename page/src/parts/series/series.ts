/** The metrics of a job by step. Where a job has many steps, a point stands for a bucket of several steps. */

import { api, ask, type Column, type Metrics } from "../../api/client";

export const MOST_POINTS = 1000;

export interface Series {
  bucketSteps: number;
  steps: number[];
  columns: Record<string, Column>;
  numAppended: number; // points of single steps behind those of the service
}

export interface Range {
  from?: number;
  to?: number;
}

export const EMPTY: Series = { bucketSteps: 1, steps: [], columns: {}, numAppended: 0 };

export async function loadSeries(jobId: string, range: Range, signal: AbortSignal): Promise<Series> {
  const query = { ...range, resolution: MOST_POINTS };
  return fromMetrics(
    await ask(api.GET("/v1/x/jobs/{job_id}/metrics", { params: { path: { job_id: jobId }, query }, signal })),
  );
}

function fromMetrics({ bucket_steps, steps, metrics }: Metrics): Series {
  return { bucketSteps: bucket_steps, steps, columns: metrics, numAppended: 0 };
}

/** Returns the series with further steps at its end. Steps that it has already are passed over. */
export function append(series: Series, told: Record<string, number>[]): Series {
  const last = series.steps.at(-1) ?? 0;
  const news = told.filter((values) => values.step! > last);
  if (!news.length) return series;
  const steps = [...series.steps, ...news.map((values) => values.step!)];
  const columns: Series["columns"] = {};
  const names = new Set([...Object.keys(series.columns), ...news.flatMap(Object.keys)]);
  for (const name of names) {
    if (name === "step" || name === "total_steps") continue;
    const added = news.map((values) => values[name] ?? null);
    const old = series.columns[name];
    const grown = (numbers?: (number | null)[]) => [...(numbers ?? series.steps.map(() => null)), ...added];
    columns[name] = { mean: grown(old?.mean), min: grown(old?.min), max: grown(old?.max), last: grown(old?.last) };
  }
  return { ...series, steps, columns, numAppended: series.numAppended + news.length };
}

export function lastOf(column: Column | undefined): number | null {
  return column?.last.findLast((value) => value !== null) ?? null;
}
