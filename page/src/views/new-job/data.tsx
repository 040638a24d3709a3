import type { Option, TrainingFile } from "../../api/client";
import { Findings, useFile } from "../../parts/file-report/file-report";
import { Show, type Loaded } from "../../parts/loading/loading";
import { href } from "../../parts/route/route";
import { Drop, ROWS } from "../../parts/upload/drop";
import { count, moment, visible } from "../../parts/words/words";
import { change, Field, OptionField, valueOf } from "./field";

interface Props {
  files: Loaded<TrainingFile[]>;
  share: Option | undefined;
}

export function Data({ files, share }: Props) {
  return (
    <fieldset class="panel">
      <legend>Data</legend>
      <File path="training_file" label="Training file" files={files} hint={ROWS} />
      <File
        path="validation_file"
        label="Validation file"
        files={files}
        hint="The model is evaluated on these rows at every checkpoint and never learns from them. You may leave it out."
      />
      {share && !valueOf("validation_file") && <OptionField path="x_raydpo.validation_share" option={share} />}
    </fieldset>
  );
}

function File({ path, label, files, hint }: { path: string; label: string; files: Loaded<TrainingFile[]>; hint?: string }) {
  const id = valueOf(path);
  const listed = files.value ?? [];
  const isListed = !id || listed.some((file) => file.id === id);
  return (
    <>
      <Field path={path} label={label} hint={hint}>
        {(attributes) => (
          <select {...attributes} value={id} onChange={(event) => change(path, event.currentTarget.value)}>
            <option value="">{listed.length ? "none chosen" : "the project has no files yet"}</option>
            {!isListed && <option value={id}>{id}</option>}
            {listed.map((file) => (
              <option key={file.id} value={file.id}>
                {nameOf(file)}
              </option>
            ))}
          </select>
        )}
      </Field>
      <Drop
        label={`Or drop a new ${label.toLowerCase()} here, or choose one:`}
        onFile={(file) => {
          change(path, file.id);
          files.again();
        }}
      />
      {id && !id.includes("://") && <Found key={id} id={id} />}
    </>
  );
}

function nameOf({ filename, created_at, x_raydpo }: TrainingFile): string {
  const rows = x_raydpo.report ? `${count(x_raydpo.report.num_rows, "row")}, ` : "";
  return `${visible(filename)} (${rows}${moment(created_at)})`;
}

function Found({ id }: { id: string }) {
  return (
    <Show of={useFile(id)}>
      {(file) => (
        <div class="found">
          <Findings file={file} />
          <a href={href(["data", id])}>See its rows</a>
        </div>
      )}
    </Show>
  );
}
