/** What the view shows of a job, kept up to date by the job's stream. */

import { signal } from "@preact/signals";
import { api, ask, Failure, type Checkpoint, type Job, type JobEvent } from "../../api/client";
import { follow, type Told } from "../../api/stream";
import { append, EMPTY, loadSeries, MOST_POINTS, type Range, type Series } from "../../parts/series/series";

const PAGE = 50;
const SETTLE_MS = 300;
const DRAWN_MS = 100; // steps are drawn at most so often

export class Feed {
  job = signal<Job | undefined>(undefined);
  failure = signal<Failure | undefined>(undefined);
  messages = signal<JobEvent[]>([]); // newest first
  hasOlder = signal(false);
  checkpoints = signal<Checkpoint[]>([]); // newest first
  series = signal<Series>(EMPTY);
  isOnLine = signal(true);

  private leaving = new AbortController();
  private steps: Record<string, number>[] = []; // that came since steps were last drawn
  private looking: number | undefined;

  constructor(
    private id: string,
    private range: Range,
  ) {}

  async run(): Promise<void> {
    try {
      // The place in the stream comes first: what happens while the rest is read is then told by the stream.
      const newest = await this.events({ limit: 1 });
      await Promise.all([this.look(), this.older(), this.reload(this.range)]);
      const told = follow(this.id, newest.last_id, this.leaving.signal, (isThere) => (this.isOnLine.value = isThere));
      for await (const each of told) this.take(each);
    } catch (error) {
      if (!this.leaving.signal.aborted) this.failure.value = Failure.of(error);
    }
  }

  leave() {
    this.leaving.abort();
    clearTimeout(this.looking);
  }

  async reload(range: Range) {
    this.range = range;
    const series = await loadSeries(this.id, range, this.leaving.signal);
    if (this.range === range) this.series.value = series;
  }

  async older() {
    const page = await this.events({ type: "message", limit: PAGE, after: this.messages.value.at(-1)?.id });
    const known = new Set(this.messages.value.map((event) => event.id));
    this.messages.value = [...this.messages.value, ...page.data.filter((event) => !known.has(event.id))];
    this.hasOlder.value = page.has_more;
  }

  /** Reads the job and its checkpoints. */
  async look() {
    const params = { path: { job_id: this.id } };
    const { signal } = this.leaving;
    const [job, checkpoints] = await Promise.all([
      ask(api.GET("/v1/fine_tuning/jobs/{job_id}", { params, signal })),
      ask(
        api.GET("/v1/fine_tuning/jobs/{job_id}/checkpoints", {
          params: { ...params, query: { limit: 100 } },
          signal,
        }),
      ),
    ]);
    this.job.value = job;
    this.checkpoints.value = checkpoints.data;
  }

  async wish(what: "pause" | "resume" | "cancel") {
    const params = { path: { job_id: this.id } };
    this.job.value = await ask(api.POST(`/v1/fine_tuning/jobs/{job_id}/${what}`, { params }));
  }

  private events(query: { limit: number; type?: "message"; after?: string }) {
    const params = { path: { job_id: this.id }, query };
    return ask(api.GET("/v1/fine_tuning/jobs/{job_id}/events", { params, signal: this.leaving.signal }));
  }

  private take(told: Told) {
    switch (told.object) {
      case "fine_tuning.job":
        this.job.value = told;
        this.lookSoon();
        break;
      case "fine_tuning.job.progress":
        this.progress(told);
        break;
      default:
        if (told.type === "metrics") this.step(told.data as Record<string, number>);
        else this.message(told);
    }
  }

  private progress({ status, waits_for, progress, estimated_finish }: Extract<Told, { progress: unknown }>) {
    const job = this.job.value!;
    if (status !== job.status) this.lookSoon();
    this.job.value = { ...job, status, estimated_finish, x_raydpo: { ...job.x_raydpo, waits_for, progress } };
  }

  private message(event: JobEvent) {
    if (this.messages.value.some((known) => known.id === event.id)) return;
    this.messages.value = [event, ...this.messages.value];
    this.lookSoon();
  }

  /** Steps that come soon after each other are drawn together. */
  private step(values: Record<string, number>) {
    if (this.range.to !== undefined && values.step! > this.range.to) return;
    if (this.steps.push(values) > 1) return;
    setTimeout(() => {
      this.series.value = append(this.series.value, this.steps);
      this.steps = [];
      if (this.series.value.numAppended > MOST_POINTS) void this.reload(this.range).catch(() => undefined);
    }, DRAWN_MS);
  }

  private lookSoon() {
    clearTimeout(this.looking);
    this.looking = window.setTimeout(() => void this.look().catch(() => undefined), SETTLE_MS);
  }
}
