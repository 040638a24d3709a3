import type { TrainingFile } from "../../api/client";
import { Findings, useFile } from "../../parts/file-report/file-report";
import { Show } from "../../parts/loading/loading";
import { href } from "../../parts/route/route";
import { bytes, moment, visible, zone } from "../../parts/words/words";
import { Rows } from "../../parts/rows/rows";
import { Seen } from "./seen";

/** One file: what its check found, its rows, and what a model would see of them. */
export function File({ id }: { id: string }) {
  return <Show of={useFile(id)} list="data">{(file) => <Known file={file} />}</Show>;
}

function Known({ file }: { file: TrainingFile }) {
  const how = file.x_raydpo;
  const facts = [
    bytes(file.bytes),
    `created ${moment(file.created_at)}`,
    file.expires_at !== null && `expires ${moment(file.expires_at)}`,
    how.max_invalid_share !== null && `at most ${100 * how.max_invalid_share} % of its rows may be left out`,
    how.columns && `columns: ${JSON.stringify(how.columns)}`,
  ];
  return (
    <>
      <div class="heading">
        <div class="title">
          <h1>
            <bdi>{visible(file.filename)}</bdi>
          </h1>
          <small class="id">{file.id}</small>
        </div>
        {file.status !== "error" && (
          <a class="button main" href={href(["jobs", "new"], { training_file: file.id })}>
            New job from it
          </a>
        )}
      </div>
      <section class="panel">
        <h2>
          Check <small title={zone()}>{facts.filter(Boolean).join(" · ")}</small>
        </h2>
        <Findings file={file} />
      </section>
      {file.status === "processed" && <Seen id={file.id} />}
      <Rows id={file.id} />
    </>
  );
}
