import type { Round } from "../../api/client";
import { Curve, type Line } from "../../parts/curve/curve";
import { percent, whole } from "../../parts/words/words";
import { bandOf, qualityOf } from "./estimates";

interface Chart {
  title: string;
  unit: string;
  show?: (value: number) => string;
  lines: Line[];
}

/** Whether the policies get better, how far they move, and how many of their answers become training data. */
export function Curves({ rounds }: { rounds: Round[] }) {
  const charts = chartsOf(rounds).filter(({ lines }) => lines.some(({ values }) => values.some((each) => each !== null)));
  if (!charts.length) return <p class="note">Curves appear when the first policy is evaluated.</p>;
  const numbers = rounds.map((round) => round.number);
  return (
    <section class="curves" aria-label="Curves">
      {charts.map((chart) => (
        <Curve key={chart.title} {...chart} steps={numbers} across="round" />
      ))}
    </section>
  );
}

function chartsOf(rounds: Round[]): Chart[] {
  const { name, ...quality } = qualityOf(rounds);
  const line = (label: string, of: (rows: Record<string, number>) => number | undefined, color: number): Line => {
    return { label, values: rounds.map(({ rows }) => (rows && of(rows)) ?? null), color, isSparse: true };
  };
  return [
    { ...quality, lines: [bandOf("policy", rounds.map((round) => round[name]), 1)] },
    {
      title: "KL from the first policy",
      unit: "nats, of an answer",
      lines: [bandOf("policy", rounds.map((round) => round.kl), 4)],
    },
    {
      title: "Acceptance",
      unit: "share of the tried answers that rejection sampling took",
      show: percent,
      lines: [line("answers", ({ num_tried, num_accepted }) => (num_tried ? num_accepted! / num_tried : undefined), 5)],
    },
    {
      title: "Rows",
      unit: "and ties, which make none",
      show: whole,
      lines: [line("rows", ({ num_rows }) => num_rows, 3), line("ties", ({ num_ties }) => num_ties, 2)],
    },
  ];
}
