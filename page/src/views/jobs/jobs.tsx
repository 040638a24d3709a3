import { api, ask, type Job } from "../../api/client";
import { Show, useFresh, useLoaded } from "../../parts/loading/loading";
import { href, route, setQuery } from "../../parts/route/route";
import { hasEnded, ProgressLine, Status, STATUSES, type JobStatus } from "../../parts/status/status";
import { count, moment, visible, zone } from "../../parts/words/words";

const PAGE = 25;

export function Jobs() {
  const { query } = route.value;
  const status = STATUSES.find((each) => each === query.get("status"));
  const after = query.get("after") ?? undefined;
  const chosen = chosenOf(query);
  const loaded = useLoaded((signal) => list(status, after, signal), [status, after]);
  const lives = !loaded.value || loaded.value.data.some((job) => !hasEnded(job.status)) || !after;
  useFresh(loaded, lives);

  return (
    <>
      <div class="heading">
        <h1>Jobs</h1>
        <label>
          Status{" "}
          <select value={status ?? ""} onChange={(event) => choose(event.currentTarget.value)}>
            <option value="">all</option>
            {STATUSES.map((each) => (
              <option>{each}</option>
            ))}
          </select>
        </label>
        <a class="button main" href={href(["jobs", "new"])}>
          New job
        </a>
      </div>
      <Chosen ids={chosen} />
      <Show of={loaded}>
        {(page) => (
          <>
            {page.data.length ? <Table jobs={page.data} /> : <Nothing status={status} isFirst={!after} />}
            <nav class="pages" aria-label="Pages">
              {after && <a href={href("jobs", { status, chosen: query.get("chosen") })}>Newest jobs</a>}
              {page.has_more && <a href={href("jobs", { status, after: page.last_id, chosen: query.get("chosen") })}>Older jobs</a>}
            </nav>
          </>
        )}
      </Show>
    </>
  );
}

/** The ids of the jobs that the reader chose to compare, also on other pages of the list. */
const chosenOf = (query: URLSearchParams) => (query.get("chosen") ?? "").split(",").filter(Boolean);

function Chosen({ ids }: { ids: string[] }) {
  return (
    <div class="acts chosen" role="status">
      {ids.length > 1 && (
        <a class="button" href={href(["jobs", "compare"], { jobs: ids.join(",") })}>
          Compare {count(ids.length, "job")}
        </a>
      )}
      {ids.length === 1 && <span>Choose another job to compare with.</span>}
      {ids.length > 0 && <button onClick={() => setQuery({ chosen: null })}>Choose none</button>}
    </div>
  );
}

function list(status: JobStatus | undefined, after: string | undefined, signal: AbortSignal) {
  return ask(api.GET("/v1/fine_tuning/jobs", { params: { query: { limit: PAGE, status, after } }, signal }));
}

function choose(status: string) {
  setQuery({ status, after: null });
}

function Nothing({ status, isFirst }: { status?: JobStatus; isFirst: boolean }) {
  if (status) return <p class="note">No job of this project is {status}. Choose another status above.</p>;
  if (!isFirst) return <p class="note">There are no older jobs.</p>;
  return (
    <p class="note">
      A job trains a model on a file of yours, such as pairs of a better and a worse answer. This project has no jobs
      yet. <a href={href(["jobs", "new"])}>Make the first one</a>.
    </p>
  );
}

function Table({ jobs }: { jobs: Job[] }) {
  return (
    <table class="list">
      <thead>
        <tr>
          <th>
            <span class="unseen">Compare</span>
          </th>
          <th>Job</th>
          <th>Status</th>
          <th>Model</th>
          <th>Method</th>
          <th>Created</th>
          <th>Ends or ended</th>
        </tr>
      </thead>
      <tbody>
        {jobs.map((job) => (
          <Row key={job.id} job={job} />
        ))}
      </tbody>
    </table>
  );
}

function Row({ job }: { job: Job }) {
  const { waits_for, progress } = job.x_raydpo;
  const end = job.finished_at ?? job.estimated_finish;
  const chosen = chosenOf(route.value.query);
  const choose = (isChosen: boolean) => {
    const others = chosen.filter((id) => id !== job.id);
    setQuery({ chosen: [...others, ...(isChosen ? [job.id] : [])].join(",") }, { replaces: true });
  };
  return (
    <tr>
      <td data-label="Compare">
        <input
          type="checkbox"
          aria-label={`Compare ${job.user_provided_suffix ?? job.id}`}
          checked={chosen.includes(job.id)}
          onChange={(event) => choose(event.currentTarget.checked)}
        />
      </td>
      <th scope="row">
        <a href={href(["jobs", job.id])}>{job.user_provided_suffix ?? job.id}</a>
        {job.user_provided_suffix && <small class="id">{job.id}</small>}
      </th>
      <td data-label="Status">
        <Status of={job.status} />
        {progress && <ProgressLine progress={progress} />}
        {waits_for && <small>waits for {visible(waits_for)}</small>}
        {job.error && <small class="bad">{visible(job.error.message)}</small>}
      </td>
      <td data-label="Model">{job.model}</td>
      <td data-label="Method">{String(job.method.type)}</td>
      <td data-label="Created" title={zone()}>
        {moment(job.created_at)}
      </td>
      <td data-label={job.finished_at ? "Ended" : "Ends"} title={zone()}>
        {end ? `${job.finished_at ? "" : "about "}${moment(end)}` : "–"}
      </td>
    </tr>
  );
}
