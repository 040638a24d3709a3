import type { Signal } from "@preact/signals";
import { useEffect, useMemo, useState } from "preact/hooks";
import { api, ask, Failure, type Job as JobObject } from "../../api/client";
import { rangeOf } from "../../parts/curve/steps";
import { AskFirst } from "../../parts/dialog/dialog";
import { Fact } from "../../parts/fact/fact";
import { FailureNote } from "../../parts/loading/loading";
import { href, route } from "../../parts/route/route";
import { hasEnded, ProgressLine, Status } from "../../parts/status/status";
import { moment, visible, whole, zone } from "../../parts/words/words";
import { Checkpoints } from "./checkpoints";
import { Curves } from "./curves";
import { Evaluations } from "./evaluations";
import { Events } from "./events";
import { Feed } from "./feed";
import { Logs } from "./logs";
import { Options } from "./options";

export function Job({ id }: { id: string }) {
  const range = rangeOf(route.value.query);
  const feed = useMemo(() => new Feed(id, range), [id]);
  useEffect(() => {
    void feed.run();
    return () => feed.leave();
  }, [feed]);
  const isFirst = feed.job.value === undefined;
  useEffect(() => {
    if (!isFirst) void feed.reload(range).catch((error) => (feed.failure.value = Failure.of(error)));
  }, [range.from, range.to]);

  const job = feed.job.value;
  if (feed.failure.value && !job) return <FailureNote failure={feed.failure.value} list="jobs" />;
  if (!job) return <p class="note">Loading…</p>;
  return (
    <>
      <Heading job={job} feed={feed} />
      {feed.failure.value && <FailureNote failure={feed.failure.value} />}
      <OffLine isOnLine={feed.isOnLine} />
      <Curves job={job} series={feed.series.value} range={range} messages={feed.messages.value} />
      <div class="columns">
        <div>
          <Facts job={job} />
          <Options job={job} />
        </div>
        <div>
          <Checkpoints job={job} checkpoints={feed.checkpoints.value} />
          <Evaluations job={job} look={() => void feed.look().catch(() => undefined)} />
          <Events feed={feed} />
        </div>
      </div>
      <Logs id={id} />
    </>
  );
}

function OffLine({ isOnLine }: { isOnLine: Signal<boolean> }) {
  return (
    <div role="status">
      {!isOnLine.value && (
        <p class="warn">The connection to the service is lost. The page tries again, and then shows what it missed.</p>
      )}
    </div>
  );
}

function Heading({ job, feed }: { job: JobObject; feed: Feed }) {
  const [failure, setFailure] = useState<Failure>();
  const wish = (what: "pause" | "resume" | "cancel") => {
    setFailure(undefined);
    feed.wish(what).catch((error) => setFailure(Failure.of(error)));
  };
  const { waits_for, progress } = job.x_raydpo;
  const isReward = String(job.method.type).startsWith("reward_");
  return (
    <>
      <div class="heading">
        <div class="title">
          <h1>{job.user_provided_suffix ?? job.id}</h1>
          {job.user_provided_suffix && <small class="id">{job.id}</small>}
        </div>
        <Status of={job.status} />
        <div class="acts">
          {job.fine_tuned_model && !isReward && (
            <a class="button main" href={href("ask", { a: job.fine_tuned_model, b: job.model })}>
              Ask the policy
            </a>
          )}
          {job.fine_tuned_model && (
            <a class="button" href={href(["evaluations", "new"], evaluationOf(job, isReward))}>
              Evaluate the {isReward ? "reward model" : "policy"}
            </a>
          )}
          <a class="button" href={href(["jobs", "new"], { again: job.id })}>
            Again, with changes
          </a>
          <a class="button" href={href("jobs", { chosen: job.id })}>
            Compare
          </a>
          {["queued", "running"].includes(job.status) && <button onClick={() => wish("pause")}>Pause</button>}
          {job.status === "paused" && <button onClick={() => wish("resume")}>Resume</button>}
          {hasEnded(job.status) ? (
            <Delete job={job} onFailure={setFailure} />
          ) : (
            <AskFirst
              act="Cancel the job"
              question="Cancel this job?"
              refusal="Keep it"
              onAgree={() => wish("cancel")}
            >
              <p>It cannot be resumed. Its checkpoints stay.</p>
            </AskFirst>
          )}
        </div>
      </div>
      {failure && <FailureNote failure={failure} />}
      {waits_for && <p>It waits for {visible(waits_for)}.</p>}
      {progress && <ProgressLine progress={progress} />}
      {job.error && (
        <div class="failure">
          <p>
            <b>{job.error.code}</b>: {visible(job.error.message)}
          </p>
        </div>
      )}
    </>
  );
}

/** A reward model writes no answers, so it is asked which ones it prefers. Rows for validation were not learned. */
const evaluationOf = ({ fine_tuned_model, validation_file }: JobObject, isReward: boolean) => ({
  model: fine_tuned_model,
  kind: isReward ? "preferences" : null,
  file: validation_file,
});

/** Deletes the job after a question, with its models if the reader wants that, and leads to the list of jobs. */
function Delete({ job, onFailure }: { job: JobObject; onFailure: (failure?: Failure) => void }) {
  const [models, setModels] = useState(false);

  async function remove() {
    onFailure(undefined);
    try {
      await ask(api.DELETE("/v1/x/jobs/{job_id}", { params: { path: { job_id: job.id }, query: { models } } }));
      location.hash = href("jobs");
    } catch (error) {
      onFailure(Failure.of(error));
    }
  }

  return (
    <AskFirst act="Delete the job" question="Delete this job?" refusal="Keep it" onAgree={remove}>
      <p>Its events, metrics, logs and result file are removed.</p>
      <label>
        <input type="checkbox" checked={models} onChange={(event) => setModels(event.currentTarget.checked)} /> Its policy and the
        models of its checkpoints, too
      </label>
    </AskFirst>
  );
}

function Facts({ job }: { job: JobObject }) {
  const facts: [string, string | null][] = [
    ["Base", job.model],
    ["Method", String(job.method.type)],
    ["Policy", job.fine_tuned_model],
    ["Training file", job.training_file],
    ["Validation file", job.validation_file],
    ["Created", moment(job.created_at)],
    ["Ends", job.estimated_finish && `about ${moment(job.estimated_finish)}`],
    ["Ended", job.finished_at && moment(job.finished_at)],
    ["Tokens trained", job.trained_tokens && whole(job.trained_tokens)],
    ...Object.entries(job.metadata ?? {}),
  ].map(([name, value]) => [visible(String(name)), value ? visible(String(value)) : null]);
  return (
    <section class="panel">
      <h2>
        Job <small>times in {zone()}</small>
      </h2>
      <dl>
        {facts.map(
          ([name, value]) =>
            value && (
              <Fact key={name} name={name}>
                {value.startsWith("file-") ? <a href={href(["data", value])}>{value}</a> : value}
              </Fact>
            ),
        )}
      </dl>
    </section>
  );
}
