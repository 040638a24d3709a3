import { createContext, type ComponentChildren } from "preact";
import { useContext } from "preact/hooks";
import { api, ask } from "../../api/client";
import { NoModels } from "../no-models/no-models";
import { visible } from "../words/words";
import { change, Field, valueOf } from "./field";

/** The names of the models that fields offer. */
export const Models = createContext<string[]>([]);

export async function loadModels(signal: AbortSignal): Promise<string[]> {
  return (await ask(api.GET("/v1/models", { signal }))).data.map((model) => model.id);
}

interface Props {
  path: string;
  label: ComponentChildren;
  hint?: ComponentChildren;
  chosen?: string; // while the address names none
  empty?: string; // what it means to choose none, if that is possible
}

/** A field for one of the models. A name that the address holds is offered even if there is no such model. */
export function ModelField({ path, label, hint, chosen = "", empty }: Props) {
  const models = useContext(Models);
  const value = valueOf(path) || chosen;
  const isGiven = Boolean(chosen) && !valueOf(path); // so that choosing nothing would change nothing
  const none = isGiven ? undefined : (empty ?? (models.length ? undefined : "no models"));
  return (
    <Field path={path} label={label} hint={models.length ? hint : <NoModels />}>
      {(attributes) => (
        <select {...attributes} value={value} onChange={(event) => change(path, event.currentTarget.value)}>
          {none !== undefined && <option value="">{none}</option>}
          {value && !models.includes(value) && <option value={value}>{visible(value)}</option>}
          {models.map((each) => (
            <option>{each}</option>
          ))}
        </select>
      )}
    </Field>
  );
}
