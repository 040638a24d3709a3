/** Follows the events of a job. A connection that is lost is made again after the last event that came. */

import { bearer, Failure, type Job, type JobEvent } from "./client";
import { framesOf, type Frame } from "./frames";

export interface Progress {
  object: "fine_tuning.job.progress";
  status: Job["status"];
  waits_for: string | null;
  progress: Job["x_raydpo"]["progress"];
  estimated_finish: number | null;
}

export type Told = JobEvent | Progress | Job;

const SILENCE_MS = 45_000; // the service sends something every 15 seconds
const WAIT_MS = 2_000;

/** Yields what the service tells after the event `place`, until the job has ended.
 *
 * `onLine` is called with false when the connection is lost, and with true when there is one again. */
export async function* follow(
  jobId: string,
  place: string | null,
  leaving: AbortSignal,
  onLine: (isThere: boolean) => void,
): AsyncGenerator<Told> {
  let wait = WAIT_MS;
  while (!leaving.aborted) {
    try {
      for await (const frame of frames(jobId, place, leaving, () => onLine(true))) {
        wait = frame.retry ?? wait;
        if (frame.data === "[DONE]") return;
        if (frame.data) yield JSON.parse(frame.data) as Told;
        place = frame.id ?? place;
      }
    } catch (error) {
      if (error instanceof Failure && error.status! < 500 && error.status !== 429) throw error;
    }
    if (leaving.aborted) return;
    onLine(false);
    await pause(wait, leaving);
  }
}

async function* frames(
  jobId: string,
  place: string | null,
  leaving: AbortSignal,
  opened: () => void,
): AsyncGenerator<Frame> {
  const silence = new AbortController();
  let timer = setTimeout(() => silence.abort(), SILENCE_MS);
  const headers = { authorization: await bearer(), ...(place && { "last-event-id": place }) };
  const signal = AbortSignal.any([leaving, silence.signal]);
  try {
    const answer = await fetch(`/v1/x/jobs/${encodeURIComponent(jobId)}/stream`, { headers, signal });
    if (!answer.ok) throw Failure.answered(answer.status, await answer.json().catch(() => undefined));
    opened();
    yield* framesOf(answer, () => {
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENCE_MS);
    });
  } finally {
    clearTimeout(timer);
  }
}

/** Waits, but no longer than until the browser says that it is online again. */
function pause(ms: number, leaving: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      window.removeEventListener("online", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    window.addEventListener("online", done);
    leaving.addEventListener("abort", done, { once: true });
  });
}
