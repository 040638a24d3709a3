import { useSignal } from "@preact/signals";
import { api, ask, Failure, type TrainingFile } from "../../api/client";
import { AskFirst } from "../../parts/dialog/dialog";
import { FailureNote, Show, useLoaded } from "../../parts/loading/loading";
import { href, route } from "../../parts/route/route";
import { Drop, ROWS } from "../../parts/upload/drop";
import { bytes, moment, visible, whole } from "../../parts/words/words";

const PAGE = 50;

/** The files of the project. */
export function Data() {
  const after = route.value.query.get("after") ?? undefined;
  const loaded = useLoaded((signal) => list(after, signal), [after]);
  const failure = useSignal<Failure | undefined>(undefined);
  const remove = (file: TrainingFile) => {
    failure.value = undefined;
    ask(api.DELETE("/v1/files/{file_id}", { params: { path: { file_id: file.id } } })).then(
      loaded.again,
      (error) => (failure.value = Failure.of(error)),
    );
  };
  return (
    <>
      <div class="heading">
        <h1>Data</h1>
      </div>
      <Drop
        label="Drop a training file here, or choose one:"
        onFile={(file) => (location.hash = href(["data", file.id]))}
      />
      {failure.value && <FailureNote failure={failure.value} />}
      <Show of={loaded}>
        {(page) => (
          <>
            {page.data.length ? <Table files={page.data} remove={remove} /> : <Nothing isFirst={!after} />}
            <nav class="pages" aria-label="Pages">
              {after && <a href={href("data")}>Newest files</a>}
              {page.has_more && <a href={href("data", { after: page.last_id })}>Older files</a>}
            </nav>
          </>
        )}
      </Show>
    </>
  );
}

function list(after: string | undefined, signal: AbortSignal) {
  return ask(api.GET("/v1/files", { params: { query: { purpose: "fine-tune", limit: PAGE, after } }, signal }));
}

function Nothing({ isFirst }: { isFirst: boolean }) {
  return <p class="note">{isFirst ? `This project has no files yet. Drop one above. ${ROWS}` : "There are no older files."}</p>;
}

function Table({ files, remove }: { files: TrainingFile[]; remove: (file: TrainingFile) => void }) {
  return (
    <table class="list files">
      <thead>
        <tr>
          <th>File</th>
          <th>Format</th>
          <th class="number">Rows</th>
          <th class="number">Size</th>
          <th>Created</th>
          <th>
            <span class="unseen">Acts</span>
          </th>
        </tr>
      </thead>
      <tbody>
        {files.map((file) => (
          <Row key={file.id} file={file} remove={remove} />
        ))}
      </tbody>
    </table>
  );
}

const STATES = { uploaded: "its rows are being checked", processed: "", error: "refused" };

function Row({ file, remove }: { file: TrainingFile; remove: (file: TrainingFile) => void }) {
  const { report } = file.x_raydpo;
  return (
    <tr>
      <th scope="row">
        <a href={href(["data", file.id])}>
          <bdi>{visible(file.filename)}</bdi>
        </a>
        <small class="id">{file.id}</small>
      </th>
      <td data-label="Format">
        {report?.format ?? "–"}
        {STATES[file.status] && <small class={file.status === "error" ? "bad" : ""}>{STATES[file.status]}</small>}
      </td>
      <td data-label="Rows" class="number">
        {report ? whole(report.num_rows) : "–"}
      </td>
      <td data-label="Size" class="number">
        {bytes(file.bytes)}
      </td>
      <td data-label="Created">
        {moment(file.created_at)}
        {file.expires_at !== null && <small>expires {moment(file.expires_at)}</small>}
      </td>
      <td>
        <AskFirst
          act="Delete"
          question={`Delete ${visible(file.filename)}?`}
          refusal="Keep it"
          onAgree={() => remove(file)}
        >
          <p>Its rows cannot be read again. Policies that learned from it stay.</p>
        </AskFirst>
      </td>
    </tr>
  );
}
