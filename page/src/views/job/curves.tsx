import type { Job, JobEvent } from "../../api/client";
import { Curve, type Line, type Mark } from "../../parts/curve/curve";
import { looks, Steps, zoom } from "../../parts/curve/steps";
import { CHARTS, isSparse, type Chart } from "../../parts/series/charts";
import type { Range, Series } from "../../parts/series/series";
import { hasEnded } from "../../parts/status/status";
import { figure, whole } from "../../parts/words/words";

function linesOf(series: Series, chart: Chart): Line[] {
  return chart.lines.flatMap(([metric, label, color]) => {
    const column = series.columns[metric];
    if (!column) return [];
    const band = series.bucketSteps > 1 && !isSparse(metric) ? { low: column.min, high: column.max } : {};
    return [{ label, values: column.mean, color, isSparse: isSparse(metric), ...band }];
  });
}

/** Where attempts (runs of the job) went on from a checkpoint. */
function marksOf(messages: JobEvent[]): Mark[] {
  return messages.flatMap(({ data }) => {
    if (typeof data?.resumed_from !== "number" || !data.resumed_from) return [];
    return [{ step: data.resumed_from, label: `attempt ${data.attempt}` }];
  });
}

interface Props {
  job: Job;
  series: Series;
  range: Range;
  messages: JobEvent[];
}

export function Curves({ job, series, range, messages }: Props) {
  const charts = CHARTS.map((chart) => ({ chart, lines: linesOf(series, chart) })).filter(({ lines }) => lines.length);
  if (!charts.length) {
    const words = hasEnded(job.status) ? "The job took no step." : "Curves appear with the first step.";
    return <p class="note">{words}</p>;
  }
  const marks = marksOf(messages);
  return (
    <section aria-label="Curves">
      <Steps steps={series.steps} bucketSteps={series.bucketSteps} range={range} />
      <Fall series={series} />
      <div class="curves">
        {charts.map(({ chart, lines }) => (
          <Curve key={chart.title} {...chart} lines={lines} marks={marks} steps={series.steps} onZoom={zoom} {...looks()} />
        ))}
      </div>
    </section>
  );
}

const PART = 10; // a tenth of the points at either end is compared

/** Warns when the chosen answers lose probability, which a growing margin hides.
 *
 * A fall counts if it is more than what the batches differ in, as two neighbours in the series tell: three standard errors. */
function Fall({ series }: { series: Series }) {
  const known = (series.columns.logps_chosen?.mean ?? []).filter((value) => value !== null);
  if (known.length < 2 * PART) return null;
  const size = Math.floor(known.length / PART);
  const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const [first, last] = [mean(known.slice(0, size)), mean(known.slice(-size))];
  const variance = mean(known.slice(1).map((value, i) => (value - known[i]!) ** 2)) / 2;
  const noise = 3 * Math.sqrt((2 * variance) / size);
  if (first - last < Math.max(1, 0.05 * Math.abs(first), noise)) return null;
  return (
    <p class="warn">
      The chosen answers have become less likely: {figure(first)} nats at the start, {figure(last)} now, after{" "}
      {whole(series.steps.at(-1)!)} steps. The margin grows because the rejected ones fall faster. If the policy should
      keep the chosen answers likely, try a smaller learning rate, or rpo or dpop as the method.
    </p>
  );
}
