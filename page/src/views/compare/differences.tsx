import { href, route, setQuery } from "../../parts/route/route";
import { CHARTS } from "../../parts/series/charts";
import { lastOf } from "../../parts/series/series";
import { settingsOf } from "../../parts/settings/settings";
import { Status } from "../../parts/status/status";
import { figure } from "../../parts/words/words";
import type { Run } from "./compare";

type Row = [name: string, values: string[]];

const METRICS = CHARTS.flatMap(({ lines, show = figure }) => lines.map(([metric]) => ({ metric, show })));

/** The settings in which jobs differ, and their last metrics. */
export function Differences({ runs }: { runs: Run[] }) {
  const isAll = route.value.query.has("all");
  const settings = settingRows(runs);
  const shown = isAll ? settings : settings.filter(([, values]) => new Set(values).size > 1);
  return (
    <section>
      <div class="heading">
        <h2>What differs</h2>
        <label class="check">
          <input
            type="checkbox"
            checked={isAll}
            onChange={(event) => setQuery({ all: event.currentTarget.checked ? 1 : null }, { replaces: true })}
          />{" "}
          All settings
        </label>
      </div>
      <div class="wide" role="region" aria-label="Settings and last metrics" tabIndex={0}>
        <table>
          <Head runs={runs} />
          <tbody>
            <Group title="Settings" rows={shown} nothing="The settings are the same." width={runs.length + 1} />
          </tbody>
          <tbody>
            <Group title="Last metrics" rows={metricRows(runs)} nothing="There are none yet." width={runs.length + 1} />
          </tbody>
        </table>
      </div>
    </section>
  );
}

function Head({ runs }: { runs: Run[] }) {
  const without = (id: string) => runs.map(({ job }) => job.id).filter((each) => each !== id);
  return (
    <thead>
      <tr>
        <td />
        {runs.map(({ job, name, color }) => (
          <th key={job.id} scope="col">
            <span class={`swatch curve-${color}`} /> <a href={href(["jobs", job.id])}>{name}</a> <Status of={job.status} />
            {runs.length > 2 && (
              <button
                class="quiet"
                aria-label={`Leave ${name} out`}
                onClick={() => setQuery({ jobs: without(job.id).join(",") })}
              >
                ×
              </button>
            )}
          </th>
        ))}
      </tr>
    </thead>
  );
}

function Group({ title, rows, nothing, width }: { title: string; rows: Row[]; nothing: string; width: number }) {
  return (
    <>
      <tr>
        <th scope="colgroup" colSpan={width} class="group">
          {title}
        </th>
      </tr>
      {!rows.length && (
        <tr>
          <td colSpan={width}>{nothing}</td>
        </tr>
      )}
      {rows.map(([name, values]) => (
        <tr key={name}>
          <th scope="row">
            <code>{name}</code>
          </th>
          {values.map((value) => (
            <td>{value}</td>
          ))}
        </tr>
      ))}
    </>
  );
}

function settingRows(runs: Run[]): Row[] {
  const settings = runs.map(({ job }) => settingsOf(job));
  const names = new Set(settings.flatMap(Object.keys));
  return [...names].map((name) => [name, settings.map((each) => each[name] ?? "–")]);
}

function metricRows(runs: Run[]): Row[] {
  const rows = METRICS.map(({ metric, show }): Row => {
    const last = runs.map(({ series }) => lastOf(series.columns[metric]));
    return [metric, last.map((value) => (value === null ? "–" : show(value)))];
  });
  return rows.filter(([, values]) => values.some((value) => value !== "–"));
}
