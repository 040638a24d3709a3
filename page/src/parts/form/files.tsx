import { createContext, type ComponentChildren } from "preact";
import { useContext } from "preact/hooks";
import { api, ask, type TrainingFile } from "../../api/client";
import { Findings, useFile } from "../file-report/file-report";
import { Show, useLoaded, type Loaded } from "../loading/loading";
import { href } from "../route/route";
import { Drop } from "../upload/drop";
import { count, moment, visible } from "../words/words";
import { change, Field, valueOf } from "./field";

const MOST = 100;

/** The files that the fields of a form offer. */
export const Files = createContext<Loaded<TrainingFile[]>>({ isLoading: true, again: () => undefined });

export const useFiles = () => useLoaded(list, []);

async function list(signal: AbortSignal): Promise<TrainingFile[]> {
  return (await ask(api.GET("/v1/files", { params: { query: { purpose: "fine-tune", limit: MOST } }, signal }))).data;
}

interface Props {
  path: string;
  label: string;
  hint?: ComponentChildren;
}

/** A field for a file of the project: one that is there, or a new one. What the service found in its rows is shown. */
export function FileField({ path, label, hint }: Props) {
  const files = useContext(Files);
  const id = valueOf(path);
  const listed = files.value ?? [];
  const isListed = !id || listed.some((file) => file.id === id);
  return (
    <>
      <Field path={path} label={label} hint={hint}>
        {(attributes) => (
          <select {...attributes} value={id} onChange={(event) => change(path, event.currentTarget.value)}>
            <option value="">{files.value?.length === 0 ? "the project has no files yet" : "none chosen"}</option>
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
