/** What the service found in the rows of a training file. */

import { api, ask, type FileReport, type TrainingFile } from "../../api/client";
import { useFresh, useLoaded, type Loaded } from "../loading/loading";
import { href } from "../route/route";
import { bytes, count, percent, visible, whole } from "../words/words";

/** Loads a file, again and again until the check of its rows has ended. It loads nothing for a
 * URI or without an id. */
export function useFile(id: string): Loaded<TrainingFile> {
  const isFile = id !== "" && !id.includes("://");
  const loaded = useLoaded((signal) => (isFile ? read(id, signal) : new Promise<TrainingFile>(() => undefined)), [id]);
  useFresh(loaded, loaded.value?.status === "uploaded");
  return loaded;
}

function read(id: string, signal: AbortSignal) {
  return ask(api.GET("/v1/files/{file_id}", { params: { path: { file_id: id } }, signal }));
}

export function Findings({ file }: { file: TrainingFile }) {
  const { report, checked_bytes } = file.x_raydpo;
  if (file.status === "error") return <p class="bad">{visible(file.status_details ?? "")}</p>;
  if (!report) {
    const far = checked_bytes === null ? "" : `: ${bytes(checked_bytes)} of ${bytes(file.bytes)} so far`;
    return (
      <p class="note" role="status">
        The service is checking the rows{far}. You may go on meanwhile.
      </p>
    );
  }
  return (
    <div class="findings">
      <p>
        {sizes(report)} in the format <b>{report.format ?? "unknown"}</b>. {longer(report)}
      </p>
      <ul>
        {report.problems.map((problem) => (
          <Finding key={problem.code} file={file} of={problem.rows} is="bad">
            left out ({problem.code}). {visible(problem.message)}
          </Finding>
        ))}
        {warnings(report).map(([of, words]) => (
          <Finding key={words} file={file} of={of} is="warn">
            {words}
          </Finding>
        ))}
      </ul>
      {notes(report).map((note) => (
        <p key={note}>{note}</p>
      ))}
    </div>
  );
}

type Lines = FileReport["contrary"];

function Finding({ file, of, is, children }: { file: TrainingFile; of: Lines; is: "bad" | "warn"; children: unknown }) {
  return (
    <li>
      <b class={is}>{count(of.count, "row")}</b> <>{children}</>{" "}
      <small>
        {of.count === 1 ? "Line" : "Lines"}{" "}
        {of.lines.map((line, place) => (
          <>
            {place > 0 && ", "}
            <a href={href(["data", file.id], { from: line })}>{line}</a>
          </>
        ))}
        {of.count > of.lines.length && ` and ${whole(of.count - of.lines.length)} more`}
      </small>
    </li>
  );
}

function sizes({ num_rows, num_groups, kind }: FileReport): string {
  const groups = kind === "pairs" ? "pair" : kind === "unpaired" ? "rated answer" : (kind ?? "groups").replace(/s$/, "");
  return `${count(num_rows, "row")}, ${count(num_groups, groups)},`;
}

function longer({ num_chosen_longer: chosen, num_rejected_longer: rejected }: FileReport): string {
  const compared = chosen + rejected;
  return compared ? `The chosen answer is the longer one in ${percent(chosen / compared)} of them.` : "";
}

function warnings({ duplicates, contrary }: FileReport): [Lines, string][] {
  const found: [Lines, string][] = [
    [duplicates.groups, "repeating an earlier row."],
    [duplicates.prompts, "with the prompt of an earlier row."],
    [duplicates.contradictions, "preferring what an earlier row rejects."],
    [contrary, "rating the rejected answer higher, in columns that are not read."],
  ];
  return found.filter(([lines]) => lines.count);
}

function notes(report: FileReport): string[] {
  const { num_identical, num_tied, num_repeating, num_margins, ignored_keys } = report;
  return [
    num_identical ? `${whole(num_identical)} have answers that are all the same, and teach nothing.` : "",
    num_tied ? `${whole(num_tied)} are ties, and are left out.` : "",
    num_repeating ? `${whole(num_repeating)} have answers that begin with their prompt, perhaps in error.` : "",
    num_margins ? `${whole(num_margins)} have a margin.` : "",
    ignored_keys.length ? `Columns that are not read: ${ignored_keys.join(", ")}.` : "",
  ].filter(Boolean);
}
