import { useEffect, useRef, useState } from "preact/hooks";
import type { Option } from "../../api/client";
import { Group } from "../../parts/form/described";
import { parsed, set, type Draft, type Values } from "../../parts/form/draft";
import { Field, OptionField, Prose } from "../../parts/form/field";
import type { Described } from "../../parts/form/schema";
import type { Known } from "../../parts/job-form/known";
import { setQuery } from "../../parts/route/route";
import { visible } from "../../parts/words/words";

const CHOSEN = "vary"; // the name in the address of the list of parameters
const IN_GRIDS = ["values"]; // the fields of a parameter in a grid, which draws nothing

const chosenOf = (draft: Draft) => (draft[CHOSEN] ?? "").split(",").filter(Boolean);
const placeOf = (path: string) => `parameters.${path}`;

/** Returns the parameters of the draft, as the request has them. */
export function parametersOf(draft: Draft): Values {
  const found: Values = Object.create(null);
  for (const path of chosenOf(draft)) {
    found[path] = Object.create(null);
    const at = `${placeOf(path)}.`;
    for (const [place, text] of Object.entries(draft)) {
      const name = place.slice(at.length);
      if (place.startsWith(at) && isUsed(name, draft)) set(found, [path, name], name === "values" ? listOf(text) : parsed(text));
    }
  }
  return found;
}

const isUsed = (name: string, draft: Draft) => IN_GRIDS.includes(name) || (draft["search.type"] ?? "grid") !== "grid";

/** Reads values that commas separate; texts need no quotes. */
function listOf(text: string): unknown[] {
  const all = parsed(`[${text}]`);
  if (!Array.isArray(all)) return text.split(",").map((each) => parsed(each.trim()));
  return all.length === 1 && Array.isArray(all[0]) ? all[0] : all;
}

/** Returns what each option of a job means by which trials may differ, by its path. */
function meaningsOf(known: Known, method: string): Record<string, string> {
  const { hyperparameters, common_hyperparameters } = known.methods.find(({ id }) => id === method) ?? {};
  const described = (options: Record<string, Option> | undefined, at: string) =>
    Object.entries(options ?? {}).map(([name, { description }]): [string, string] => [at + name, description]);
  return Object.fromEntries([
    ["model", "The model that the job starts from."],
    ["method.type", "The objective, such as dpo."],
    ["seed", "The seed that shuffles the rows."],
    ...described(hyperparameters, "method.*.hyperparameters."),
    ...described(common_hyperparameters, "method.*.hyperparameters."),
    ...described(known.options, "x_raydpo."),
  ]);
}

const nameOf = (path: string) => visible(path.replace(/^x_raydpo\.|^method\.\*\.hyperparameters\./, ""));

interface Props {
  known: Known;
  of: Described[]; // the fields of each parameter
  words: string;
  draft: Draft;
  method: string;
}

/** The options in which the trials differ, each with its values, or with the range from which they are drawn. */
export function Parameters({ known, of, words, draft, method }: Props) {
  const [next, setNext] = useState("");
  const added = useRef<string | undefined>(undefined);
  const chosen = chosenOf(draft);
  const meanings = meaningsOf(known, method);
  useEffect(() => {
    if (added.current) document.getElementById(`${placeOf(added.current)}.values`)?.focus();
    added.current = undefined;
  }, [chosen.length]);

  function add() {
    if (!next) return;
    added.current = next;
    setNext("");
    setQuery({ [CHOSEN]: [...chosen, next].join(",") }, { replaces: true });
  }

  function remove(path: string) {
    const fields = of.map(({ name }): [string, null] => [`${placeOf(path)}.${name}`, null]);
    const others = chosen.filter((each) => each !== path);
    setQuery({ ...Object.fromEntries(fields), [CHOSEN]: others.join(",") }, { replaces: true });
    document.getElementById("parameters")?.focus();
  }

  return (
    <fieldset class="panel">
      <legend>In what the trials differ</legend>
      <Field path="parameters" label="Option" hint={<Prose text={words} />}>
        {(attributes) => (
          <select {...attributes} value={next} onChange={(event) => setNext(event.currentTarget.value)}>
            <option value="">none chosen</option>
            {Object.keys(meanings)
              .filter((path) => !chosen.includes(path))
              .map((path) => (
                <option value={path}>{nameOf(path)}</option>
              ))}
          </select>
        )}
      </Field>
      <button type="button" onClick={add} disabled={!next}>
        Vary this option
      </button>
      {chosen.map((path) => (
        <Group key={path} path={placeOf(path)} title={<code>{nameOf(path)}</code>} words={meanings[path] ?? ""}>
          <div class="options">
            {of
              .filter(({ name }) => isUsed(name, draft))
              .map(({ name, option }) => (
                <OptionField
                  key={name}
                  path={`${placeOf(path)}.${name}`}
                  name={name}
                  option={name === "values" ? { ...option, description: `${option.description} Commas separate them.` } : option}
                />
              ))}
          </div>
          <button type="button" onClick={() => remove(path)}>
            Do not vary {nameOf(path)}
          </button>
        </Group>
      ))}
    </fieldset>
  );
}
