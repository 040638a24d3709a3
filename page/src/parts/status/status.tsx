import type { Job } from "../../api/client";
import { duration, percent, whole } from "../words/words";

export const STATUSES = ["queued", "running", "paused", "succeeded", "failed", "cancelled"] as const;
export type JobStatus = Job["status"];
export const hasEnded = (status: JobStatus) => ["succeeded", "failed", "cancelled"].includes(status);

/** Where a job is, or a trial or an evaluation. */
export function Status({ of }: { of: JobStatus | "training" | "evaluating" | "stopped" | "waiting" }) {
  return <span class={`status ${of}`}>{of}</span>;
}

type Progress = NonNullable<Job["x_raydpo"]["progress"]>;

/** The stage of the running attempt, how far it is, and the time that is left. */
export function ProgressLine({ progress }: { progress: Progress }) {
  const { stage, done, total, eta_seconds } = progress;
  const unit = stage === "training" ? "steps" : stage === "downloading" ? "bytes" : "rows";
  const share = total > 0 ? done / total : null;
  return (
    <div class="progress">
      <progress aria-label={stage} max={1} value={share ?? undefined} />
      <span>
        {stage}
        {share !== null && ` ${percent(share)} · ${whole(done)} of ${whole(total)} ${unit}`}
        {eta_seconds != null && ` · ${duration(eta_seconds)} left`}
      </span>
    </div>
  );
}
