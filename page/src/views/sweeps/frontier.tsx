/** The reward of each policy of a sweep against its KL from the reference, with 95 % intervals. */

import { useEffect, useRef, useState } from "preact/hooks";
import type { Frontier as FrontierObject, FrontierPoint } from "../../api/client";
import { href, route, setQuery } from "../../parts/route/route";
import { figure } from "../../parts/words/words";
import { valueText, type Names } from "./names";

const HEIGHT = 340;
const MARGIN = { left: 64, right: 16, top: 12, bottom: 44 };
const NUM_MARKS = 5;
const NUM_COLORS = 6;
const SAME = 1e-9; // values that differ by a smaller share of them count as equal
const MOST_STEPS = 2 ** 52; // from zero; beyond this, numbers have no room for one step more

interface Range {
  from: number;
  to: number;
}

interface Props {
  frontier: FrontierObject;
  names: Names;
}

export function Frontier({ frontier, names }: Props) {
  const points = frontier.data;
  if (!points.length) return <p class="note">The frontier appears when a trial has its evaluations.</p>;
  const methods = [...new Set(points.map((point) => point.method))];
  const whole = rangeOf(points.flatMap(({ kl }) => [kl.low, kl.high]));
  const given = zoomOf(route.value.query);
  const kl = { from: given.from ?? whole.from, to: given.to ?? whole.to };
  const isZoomed = given.from !== undefined || given.to !== undefined;
  return (
    <section class="panel">
      <h2>Reward against KL</h2>
      <div class="steps">
        <Bound name="from" label="KL from" value={given.from} other={whole.from} />
        <Bound name="to" label="to" value={given.to} other={whole.to} />
        {isZoomed && <button onClick={() => setQuery({ from: null, to: null })}>All points</button>}
        <ul class="legend">
          {methods.map((method, at) => (
            <li key={method}>
              <span class={`swatch curve-${(at % NUM_COLORS) + 1}`} /> {method}
            </li>
          ))}
          <li>– – no policy with at most this KL has a higher reward</li>
        </ul>
      </div>
      <Chart points={points} kl={kl.from < kl.to ? kl : whole} methods={methods} names={names} />
      <p class="hint">
        Across: {frontier.kl}, in nats. Up: {frontier.reward}. Bars are 95 % intervals. Each point leads to its job; drag to see a range.
      </p>
    </section>
  );
}

interface BoundProps {
  name: "from" | "to";
  label: string;
  value?: number;
  other: number;
}

function Bound({ name, label, value, other }: BoundProps) {
  return (
    <label>
      {label}{" "}
      <input
        type="number"
        step="any"
        value={value ?? ""}
        placeholder={figure(other)}
        onChange={(event) => setQuery({ [name]: event.currentTarget.value })}
      />
    </label>
  );
}

function zoomOf(query: URLSearchParams): Partial<Range> {
  const number = (name: string) => {
    const value = query.get(name);
    return value !== null && Number.isFinite(Number(value)) ? Number(value) : undefined;
  };
  return { from: number("from"), to: number("to") };
}

/** The range of the values, with a little room at both ends. */
function rangeOf(values: number[]): Range {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const isOne = high - low <= SAME * Math.abs(high);
  const room = (isOne ? Math.abs(high) || 1 : high - low) * 0.06;
  return { from: low - room, to: high + room };
}

interface ChartProps {
  points: FrontierPoint[];
  kl: Range;
  methods: string[];
  names: Names;
}

function Chart({ points, kl, methods, names }: ChartProps) {
  const place = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(720);
  const [drag, setDrag] = useState<Range>();
  useEffect(() => {
    const element = place.current!;
    const watching = new ResizeObserver(() => setWidth(Math.max(280, element.clientWidth)));
    watching.observe(element);
    return () => watching.disconnect();
  }, []);
  const seen = points.filter((point) => point.kl.value >= kl.from && point.kl.value <= kl.to);
  const reward = rangeOf((seen.length ? seen : points).flatMap((point) => [point.reward.low, point.reward.high]));
  const x = scale(kl, MARGIN.left, width - MARGIN.right);
  const y = scale(reward, HEIGHT - MARGIN.bottom, MARGIN.top);
  const valueAt = (event: PointerEvent) => {
    const left = event.clientX - place.current!.getBoundingClientRect().left;
    return kl.from + ((left - MARGIN.left) / (width - MARGIN.left - MARGIN.right)) * (kl.to - kl.from);
  };

  function release() {
    if (drag && Math.abs(x(drag.to) - x(drag.from)) > 4) {
      const [from, to] = [Math.min(drag.from, drag.to), Math.max(drag.from, drag.to)];
      setQuery({ from: from.toPrecision(4), to: to.toPrecision(4) });
    }
    setDrag(undefined);
  }

  return (
    <div ref={place} class="frontier">
      <svg
        width={width}
        height={HEIGHT}
        role="group"
        aria-label={`${seen.length} of ${points.length} policies`}
        onPointerDown={(event) => event.button === 0 && setDrag({ from: valueAt(event), to: valueAt(event) })}
        onPointerMove={(event) => drag && setDrag({ ...drag, to: valueAt(event) })}
        onPointerUp={release}
        onPointerLeave={() => setDrag(undefined)}
      >
        <Axes kl={kl} reward={reward} x={x} y={y} width={width} />
        <polyline
          class="joined"
          points={seen
            .filter((point) => point.on_frontier)
            .map((point) => `${x(point.kl.value)},${y(point.reward.value)}`)
            .join(" ")}
        />
        {seen.map((point) => (
          <Point
            key={point.trial}
            point={point}
            color={(methods.indexOf(point.method) % NUM_COLORS) + 1}
            clip={{ x: (value) => x(Math.min(kl.to, Math.max(kl.from, value))), y }}
            label={valueText(withoutMethod(point.parameters), names)}
            isAtRight={x(point.kl.value) > 0.75 * width}
          />
        ))}
        {drag && (
          <rect
            class="chosen-range"
            x={Math.min(x(drag.from), x(drag.to))}
            width={Math.abs(x(drag.to) - x(drag.from))}
            y={MARGIN.top}
            height={HEIGHT - MARGIN.top - MARGIN.bottom}
          />
        )}
      </svg>
    </div>
  );
}

/** The colour of a point shows the method, so its label need not. */
function withoutMethod({ "method.type": _, ...others }: Record<string, unknown>) {
  return others;
}

function scale({ from, to }: Range, low: number, high: number) {
  return (value: number) => low + ((value - from) / (to - from)) * (high - low);
}

interface AxesProps {
  kl: Range;
  reward: Range;
  x: (value: number) => number;
  y: (value: number) => number;
  width: number;
}

function Axes({ kl, reward, x, y, width }: AxesProps) {
  return (
    <g class="axes">
      {marksOf(kl).map((mark) => (
        <g key={mark}>
          <line x1={x(mark)} x2={x(mark)} y1={MARGIN.top} y2={HEIGHT - MARGIN.bottom} />
          <text x={x(mark)} y={HEIGHT - MARGIN.bottom + 18} text-anchor="middle">
            {figure(mark)}
          </text>
        </g>
      ))}
      {marksOf(reward).map((mark) => (
        <g key={mark}>
          <line x1={MARGIN.left} x2={width - MARGIN.right} y1={y(mark)} y2={y(mark)} />
          <text x={MARGIN.left - 8} y={y(mark) + 4} text-anchor="end">
            {figure(mark)}
          </text>
        </g>
      ))}
      <text x={(MARGIN.left + width) / 2} y={HEIGHT - 6} text-anchor="middle">
        KL from the reference, nats
      </text>
    </g>
  );
}

/** Round numbers within the range, about five of them. */
function marksOf({ from, to }: Range): number[] {
  const rough = (to - from) / NUM_MARKS;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
  if (Math.max(Math.abs(from), Math.abs(to)) / step > MOST_STEPS) return [from];
  const marks = [];
  for (let at = Math.ceil(from / step); at * step <= to; at++) marks.push(Number((at * step).toPrecision(12)));
  return marks;
}

interface PointProps {
  point: FrontierPoint;
  color: number;
  clip: { x: (value: number) => number; y: (value: number) => number };
  label: string;
  isAtRight: boolean; // so that the label stands on the left of the point
}

function Point({ point: { job_id, kl, reward, method }, color, clip: { x, y }, label, isAtRight }: PointProps) {
  const [across, up] = [x(kl.value), y(reward.value)];
  const told = `${method}, ${label}: KL ${figure(kl.value)} (${figure(kl.low)} to ${figure(kl.high)}), reward ${figure(reward.value)} (${figure(reward.low)} to ${figure(reward.high)})`;
  return (
    <a class={`point curve-${color}`} href={href(["jobs", job_id])} aria-label={told} draggable={false}>
      <title>{told}</title>
      <line x1={x(kl.low)} x2={x(kl.high)} y1={up} y2={up} />
      <line x1={across} x2={across} y1={y(reward.low)} y2={y(reward.high)} />
      <circle cx={across} cy={up} r={5} />
      <text x={across + (isAtRight ? -8 : 8)} y={up - 8} text-anchor={isAtRight ? "end" : "start"}>
        {label}
      </text>
    </a>
  );
}
