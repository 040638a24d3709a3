import type { Job } from "../../api/client";
import { Curve, type Line } from "../../parts/curve/curve";
import { setQuery } from "../../parts/route/route";
import type { Range, Series } from "../../parts/series/series";
import { count, figure, percent, whole } from "../../parts/words/words";
import { hasEnded } from "../../parts/status/status";

interface Chart {
  title: string;
  unit?: string;
  show?: (value: number) => string;
  lines: [metric: string, label: string, color: number][];
}

const CHARTS: Chart[] = [
  { title: "Loss", lines: [["train_loss", "training", 1], ["full_valid_loss", "validation", 2]] },
  {
    title: "Margin",
    unit: "reward of the chosen answer less that of the rejected one",
    lines: [["train_reward_margin", "training", 1], ["full_valid_reward_margin", "validation", 2]],
  },
  {
    title: "Accuracy",
    unit: "share of pairs in the right order",
    show: percent,
    lines: [["train_reward_accuracy", "training", 1], ["full_valid_reward_accuracy", "validation", 2]],
  },
  {
    title: "Accuracy of tokens",
    show: percent,
    lines: [["train_mean_token_accuracy", "training", 1], ["full_valid_mean_token_accuracy", "validation", 2]],
  },
  {
    title: "Log-probabilities",
    unit: "nats, of an answer",
    lines: [
      ["logps_chosen", "chosen", 3],
      ["logps_rejected", "rejected", 2],
      ["eval/logps/chosen", "chosen, validation", 5],
      ["eval/logps/rejected", "rejected, validation", 6],
    ],
  },
  { title: "Rewards", lines: [["rewards_chosen", "chosen", 3], ["rewards_rejected", "rejected", 2]] },
  { title: "KL from the reference", unit: "nats", lines: [["kl", "training", 1], ["eval/kl", "validation", 2]] },
  { title: "Throughput", unit: "tokens a second", lines: [["tokens_per_second", "all workers", 5]] },
  { title: "Norm of the gradient", lines: [["grad_norm", "before clipping", 4]] },
  { title: "Learning rate", lines: [["learning_rate", "of the step", 4]] },
];

function linesOf(series: Series, chart: Chart): Line[] {
  return chart.lines.flatMap(([metric, label, color]) => {
    const column = series.columns[metric];
    if (!column) return [];
    const isSparse = metric.startsWith("full_valid_") || metric.startsWith("eval/");
    const band = series.bucketSteps > 1 && !isSparse ? { low: column.min, high: column.max } : {};
    return [{ label, values: column.mean, color, isSparse, ...band }];
  });
}

export function Curves({ job, series, range }: { job: Job; series: Series; range: Range }) {
  const zoom = (from: number, to: number) => from < to && setQuery({ from, to });
  const charts = CHARTS.map((chart) => ({ chart, lines: linesOf(series, chart) })).filter(({ lines }) => lines.length);
  if (!charts.length) {
    const words = hasEnded(job.status) ? "The job took no step." : "Curves appear with the first step.";
    return <p class="note">{words}</p>;
  }
  return (
    <section aria-label="Curves">
      <Steps series={series} range={range} />
      <Fall series={series} />
      <div class="curves">
        {charts.map(({ chart, lines }) => (
          <Curve key={chart.title} {...chart} lines={lines} steps={series.steps} onZoom={zoom} />
        ))}
      </div>
    </section>
  );
}

/** Which steps are shown. The fields do what dragging over a chart does. */
function Steps({ series, range }: { series: Series; range: Range }) {
  const field = (name: "from" | "to", other: number | undefined) => (
    <input
      type="number"
      min={1}
      value={range[name] ?? ""}
      placeholder={String(other ?? "")}
      onChange={(event) => setQuery({ [name]: event.currentTarget.value })}
    />
  );
  return (
    <div class="steps">
      <label>Steps from {field("from", series.steps[0])}</label>
      <label>to {field("to", series.steps.at(-1))}</label>
      {(range.from ?? range.to) !== undefined && (
        <button onClick={() => setQuery({ from: null, to: null })}>All steps</button>
      )}
      {series.bucketSteps > 1 && (
        <small>
          Each point is the mean of {count(series.bucketSteps, "step")}, and the band reaches from the least to the most.
        </small>
      )}
    </div>
  );
}

const PART = 10; // a tenth of the points at either end is compared

/** Warns when the chosen answers lose probability, which a growing margin hides. */
function Fall({ series }: { series: Series }) {
  const known = (series.columns.logps_chosen?.mean ?? []).filter((value) => value !== null);
  if (known.length < 2 * PART) return null;
  const size = Math.floor(known.length / PART);
  const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const [first, last] = [mean(known.slice(0, size)), mean(known.slice(-size))];
  if (first - last < Math.max(1, 0.05 * Math.abs(first))) return null;
  return (
    <p class="warn">
      The chosen answers have become less likely: {figure(first)} nats at the start, {figure(last)} now, after{" "}
      {whole(series.steps.at(-1)!)} steps. The margin grows because the rejected ones fall faster. If the policy should
      keep the chosen answers likely, try a smaller learning rate, or rpo or dpop as the method.
    </p>
  );
}
