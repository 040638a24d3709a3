/** How curves are shown, of which all stands in the address: the range of steps, smoothing, and the axis. */

import { route, setQuery } from "../route/route";
import type { Range } from "../series/series";
import { count } from "../words/words";

export interface Looks {
  smoothing: number; // the share of a point that comes from the points before it
  isLog: boolean;
}

export function looks(): Looks {
  const { query } = route.value;
  const smoothing = Number(query.get("smoothing"));
  return { smoothing: smoothing > 0 && smoothing < 1 ? smoothing : 0, isLog: query.has("log-axis") };
}

export function rangeOf(query: URLSearchParams): Range {
  const number = (name: string) => {
    const value = Number(query.get(name));
    return Number.isInteger(value) && value > 0 ? value : undefined;
  };
  return { from: number("from"), to: number("to") };
}

export const zoom = (from: number, to: number) => from < to && setQuery({ from, to });

interface Props {
  steps: number[];
  bucketSteps: number;
  range: Range;
}

/** Fields for how curves are shown. Those of the range do what dragging over a chart does. */
export function Steps({ steps, bucketSteps, range }: Props) {
  const { smoothing, isLog } = looks();
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
      <label>Steps from {field("from", steps[0])}</label>
      <label>to {field("to", steps.at(-1))}</label>
      {(range.from ?? range.to) !== undefined && (
        <button onClick={() => setQuery({ from: null, to: null })}>All steps</button>
      )}
      <label>
        Smoothing{" "}
        <input
          type="range"
          min={0}
          max={0.99}
          step={0.01}
          value={smoothing}
          onInput={(event) => setQuery({ smoothing: Number(event.currentTarget.value) || null }, { replaces: true })}
        />
      </label>
      <label class="check">
        <input
          type="checkbox"
          checked={isLog}
          onChange={(event) => setQuery({ "log-axis": event.currentTarget.checked ? 1 : null }, { replaces: true })}
        />{" "}
        Logarithmic axis
      </label>
      {bucketSteps > 1 && (
        <small>
          Each point is the mean of {count(bucketSteps, "step")}, and the band reaches from the least to the most.
        </small>
      )}
    </div>
  );
}
