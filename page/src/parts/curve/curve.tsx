/** A chart of curves over steps, or over rounds. Its legend shows the values at the cursor, or the last ones. */

import { signal, useSignal } from "@preact/signals";
import { useEffect, useMemo, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { drawSoon, leave, see } from "./drawing";
import { count, figure, whole } from "../words/words";

export interface Line {
  label: string;
  values: (number | null)[];
  low?: (number | null)[]; // with `high`: the band of a bucket of several steps
  high?: (number | null)[];
  color: number; // of the sheet's curves, from 1
  isSparse?: boolean; // a value at some steps only, drawn with points
  raw?: (number | null)[]; // before smoothing, drawn behind
}

export interface Mark {
  step: number; // the mark is drawn after this step
  label: string;
}

interface Props {
  title: string;
  unit?: string;
  steps: number[];
  across?: string; // what a step is called, such as "round"
  lines: Line[];
  marks?: Mark[];
  show?: (value: number) => string;
  onZoom?: (from: number, to: number) => void;
  smoothing?: number; // the share of a point that comes from the points before it, below 1
  isLog?: boolean; // draws a logarithmic axis, if all values are positive
  isLabelled?: boolean; // writes the name of each line at its end
}

const HEIGHT = 200;
const darkness = matchMedia("(prefers-color-scheme: dark)");
const isDark = signal(darkness.matches);
darkness.addEventListener("change", (event) => (isDark.value = event.matches));

export function Curve({
  title,
  unit,
  steps,
  across = "step",
  lines: given,
  marks = [],
  show = figure,
  onZoom,
  smoothing = 0,
  isLog,
  isLabelled,
}: Props) {
  const lines = useMemo(() => given.map((line) => smoothed(line, smoothing)), [smoothing, ...given.map((line) => line.values)]);
  const isLogarithmic = Boolean(isLog) && lines.every((line) => allValues(line).every((value) => value === null || value > 0));
  const place = useRef<HTMLDivElement>(null);
  const chart = useRef<uPlot | null>(null);
  const latest = useRef(lines);
  latest.current = lines;
  const marked = useRef(marks);
  marked.current = marks;
  const zoom = useRef(onZoom);
  zoom.current = onZoom;
  const cursor = useSignal<number | null>(null);
  const data = [steps, ...lines.flatMap(valuesOf)] as uPlot.AlignedData;
  const shape = JSON.stringify([isLogarithmic, lines.map((line) => [line.label, line.color, valuesOf(line).length])]);

  useEffect(() => {
    const element = place.current!;
    const options = optionsOf(lines, element.clientWidth, show, isLogarithmic);
    if (isLabelled) options.padding = [null, LABEL_WIDTH, null, null];
    options.hooks = {
      draw: [(self) => drawMarks(self, marked.current), ...(isLabelled ? [(self: uPlot) => writeLabels(self, latest.current)] : [])],
      setCursor: [(self) => (cursor.value = self.cursor.idx ?? null)],
      setSelect: [
        (self) => {
          if (self.select.width < 2) return;
          const [left, right] = [self.select.left, self.select.left + self.select.width];
          self.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          zoom.current?.(Math.ceil(self.posToVal(left, "x")), Math.floor(self.posToVal(right, "x")));
        },
      ],
    };
    const made = (chart.current = new uPlot(options, data, element));
    const watching = new ResizeObserver(() => made.setSize({ width: element.clientWidth, height: HEIGHT }));
    watching.observe(element);
    const looking = new IntersectionObserver(([entry]) => see(made, entry!.isIntersecting));
    looking.observe(element);
    return () => {
      watching.disconnect();
      looking.disconnect();
      leave(made);
      made.destroy();
      chart.current = null;
    };
  }, [shape, isDark.value]);
  useEffect(() => {
    if (chart.current) drawSoon(chart.current, data);
  }, [steps, ...lines.map((line) => line.values)]);
  useEffect(() => chart.current?.redraw(false), [JSON.stringify(marks)]);

  const at = cursor.value;
  return (
    <figure class="curve" aria-label={`${title}: ${summary(lines, steps, marks, across, show)}`}>
      <figcaption>
        <h3>
          {title} {unit && <small>{unit}</small>}{" "}
          {isLog && !isLogarithmic && <small>(linear, because not all values are positive)</small>}
        </h3>
        <ul class="legend">
          {lines.map((line) => (
            <li key={line.label}>
              <span class={`swatch curve-${line.color}`} /> {line.label} <b>{valueAt(line, at, show)}</b>
            </li>
          ))}
          {at !== null && <li>
              {across} {whole(steps[at] ?? 0)}
            </li>}
        </ul>
      </figcaption>
      <div ref={place} aria-hidden="true" />
    </figure>
  );
}

/** Mean of the points so far, which fade with their distance, as TensorBoard computes it. */
function smoothed(line: Line, smoothing: number): Line {
  if (!smoothing || line.isSparse) return line;
  let [sum, weight] = [0, 0];
  const values = line.values.map((value) => {
    if (value === null || value === undefined) return null;
    [sum, weight] = [sum * smoothing + value * (1 - smoothing), weight * smoothing + (1 - smoothing)];
    return sum / weight;
  });
  return { ...line, values, raw: line.values, low: undefined, high: undefined };
}

const allValues = ({ values, raw = [], low = [] }: Line) => [...values, ...raw, ...low];

/** The rows of a line in the data of the chart, in the order in which they are drawn. */
const valuesOf = (line: Line) => [...(line.raw ? [line.raw] : []), line.values, ...bandOf(line)];

const bandOf = (line: Line) => (line.low && line.high ? [line.high, line.low] : []);

function valueAt(line: Line, at: number | null, show: (value: number) => string): string {
  const value = at === null ? line.values.findLast((each) => each != null) : line.values[at];
  return value == null ? "–" : show(value);
}

function summary(lines: Line[], steps: number[], marks: Mark[], across: string, show: (value: number) => string): string {
  if (!steps.length) return `no ${across}s yet`;
  const told = lines.map((line) => {
    const known = line.values.filter((value) => value != null);
    return known.length ? `${line.label} from ${show(known[0]!)} to ${show(known.at(-1)!)}` : `${line.label} has none`;
  });
  const points = count(steps.length, "point");
  const marked = marks.map(({ step, label }) => `; ${label} from ${across} ${whole(step + 1)}`).join("");
  return `${told.join(", ")}; ${points}, ${across}s ${whole(steps[0]!)} to ${whole(steps.at(-1)!)}${marked}`;
}

/** Draws a dashed line after the step of each mark that is in sight, with the mark's label at its top. */
function drawMarks(chart: uPlot, marks: Mark[]) {
  const { ctx, bbox, scales } = chart;
  const scale = devicePixelRatio;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--faint").trim();
  ctx.font = `${11 * scale}px system-ui, sans-serif`;
  ctx.textAlign = "left";
  ctx.textBaseline = "top";
  ctx.setLineDash([4 * scale, 4 * scale]);
  for (const { step, label } of marks) {
    if (step < scales.x!.min! || step > scales.x!.max!) continue;
    const x = chart.valToPos(step + 0.5, "x", true);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.fillText(label, x + 4 * scale, bbox.top);
  }
  ctx.restore();
}

const LABEL_WIDTH = 86;
const LABEL_HEIGHT = 13;

/** Writes the name of each line beside its last point. Names that would cover each other move down. */
function writeLabels(chart: uPlot, lines: Line[]) {
  const { ctx, bbox } = chart;
  const scale = devicePixelRatio;
  const style = getComputedStyle(document.documentElement);
  const ends = lines.flatMap((line) => {
    const last = line.values.findLast((value) => value != null);
    return last == null ? [] : [{ line, y: chart.valToPos(last, "y", true) }];
  });
  let free = -Infinity;
  ctx.save();
  ctx.font = `${12 * scale}px system-ui, sans-serif`;
  ctx.textAlign = "left";
  ctx.textBaseline = "middle";
  for (const { line, y } of ends.sort((a, b) => a.y - b.y)) {
    const at = Math.max(y, free);
    ctx.fillStyle = style.getPropertyValue(`--curve-${line.color}`).trim();
    ctx.fillText(shortened(line.label), bbox.left + bbox.width + 6 * scale, at);
    free = at + LABEL_HEIGHT * scale;
  }
  ctx.restore();
}

const shortened = (label: string) => (label.length > 12 ? `${label.slice(0, 11)}…` : label);

function optionsOf(lines: Line[], width: number, show: (value: number) => string, isLog: boolean): uPlot.Options {
  const style = getComputedStyle(document.documentElement);
  const ink = (name: string) => style.getPropertyValue(name).trim();
  const font = "12px system-ui, sans-serif";
  const axis = { stroke: ink("--faint"), font, grid: { stroke: ink("--line"), width: 1 }, ticks: { show: false } };
  const series: uPlot.Series[] = [{}];
  const bands: uPlot.Band[] = [];
  for (const line of lines) {
    const stroke = ink(`--curve-${line.color}`);
    if (line.raw) series.push({ stroke: `${stroke}55`, width: 1, spanGaps: true, points: { show: false } });
    const points = line.isSparse ? { show: true, size: 6, fill: stroke } : undefined;
    series.push({ stroke, width: 1.5, spanGaps: true, points });
    if (!bandOf(line).length) continue;
    bands.push({ series: [series.length, series.length + 1], fill: `${stroke}2e` });
    series.push({ points: { show: false } }, { points: { show: false } });
  }
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    cursor: { sync: { key: "steps" }, y: false, drag: { x: true, y: false, setScale: false } },
    scales: { x: { time: false }, y: isLog ? { distr: 3 } : {} },
    axes: [
      { ...axis, size: 30, values: (_, marks) => marks.map((mark) => (Number.isInteger(mark) ? whole(mark) : "")) },
      { ...axis, size: 62, values: (_, marks) => marks.map((mark) => (mark === null ? "" : show(mark))) },
    ],
    series,
    bands,
  };
}
