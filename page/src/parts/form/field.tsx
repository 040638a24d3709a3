import { useSignal } from "@preact/signals";
import { createContext, type ComponentChildren } from "preact";
import { useContext } from "preact/hooks";
import type { Failure, Option } from "../../api/client";
import { route, setQuery } from "../route/route";
import { visible } from "../words/words";
import { textOf } from "./draft";

/** The refusal of the draft, which a field shows if it names the field. */
export const Refusal = createContext<Failure | undefined>(undefined);

export const valueOf = (path: string) => route.value.query.get(path) ?? "";
export const change = (path: string, value: string) => setQuery({ [path]: value }, { replaces: true });

interface Props {
  path: string;
  label: ComponentChildren;
  hint?: ComponentChildren;
  children: (attributes: Attributes) => ComponentChildren;
}

export interface Attributes {
  id: string;
  "aria-describedby": string;
  "aria-invalid": boolean;
}

/** A field with its label, what it means, and why the service refuses its value. */
export function Field({ path, label, hint, children }: Props) {
  const refusal = useContext(Refusal);
  const isRefused = refusal?.param === path;
  const about = `about ${path}`.replaceAll(" ", "-");
  return (
    <div class="field">
      <label for={path}>{label}</label>
      {children({ id: path, "aria-describedby": about, "aria-invalid": isRefused })}
      <div id={about} class="hint">
        {isRefused && <p class="bad">{visible(refusal.message)}</p>}
        {hint}
      </div>
    </div>
  );
}

type TextProps = Omit<Props, "children"> & { placeholder?: string };

export function TextField({ path, label, hint, placeholder }: TextProps) {
  const typing = useTyping(path);
  return (
    <Field path={path} label={label} hint={hint}>
      {(attributes) => <input {...attributes} {...typing} placeholder={placeholder} autocomplete="off" spellcheck={false} />}
    </Field>
  );
}

/** A field for a text of several lines. */
export function Area({ path, label, hint }: TextProps) {
  const typing = useTyping(path);
  return (
    <Field path={path} label={label} hint={hint}>
      {(attributes) => <textarea {...attributes} {...typing} rows={4} />}
    </Field>
  );
}

function useTyping(path: string) {
  const typed = useSignal<string | undefined>(undefined); // what is not yet in the address
  type Typed = { currentTarget: { value: string } };
  return {
    value: typed.value ?? valueOf(path),
    onInput: ({ currentTarget }: Typed) => void (typed.value = currentTarget.value),
    onChange: ({ currentTarget }: Typed) => {
      change(path, currentTarget.value.trim());
      typed.value = undefined;
    },
  };
}

interface OptionProps {
  path: string;
  name: string;
  option: Option;
  chosen?: string; // of its choices, while the address names none
}

/** A field for an option that the API describes. It is empty while the option has its default. */
export function OptionField({ path, name, option, chosen = "" }: OptionProps) {
  const label = <code>{name}</code>;
  const words = [option.description, option.choices ? "" : limits(option)].filter(Boolean).join(" ");
  const hint = <Prose text={words} />;
  if (!option.choices) return <TextField path={path} label={label} hint={hint} placeholder={defaultOf(option)} />;
  const value = valueOf(path) || chosen;
  const isGiven = Boolean(chosen) && !valueOf(path); // so that choosing nothing would change nothing
  const isOffered = (each: unknown) => each !== option.default || textOf(each) === value;
  return (
    <Field path={path} label={label} hint={hint}>
      {(attributes) => (
        <select {...attributes} value={value} onChange={(event) => change(path, event.currentTarget.value)}>
          {!isGiven && <option value="">{emptyOf(option)}</option>}
          {option.choices!.filter(isOffered).map((each) => (
            <option>{textOf(each)}</option>
          ))}
        </select>
      )}
    </Field>
  );
}

/** What a choice says that is not made. Without a default, one must be made. */
function emptyOf({ default: value }: Option): string {
  if (value === undefined) return "none chosen";
  return value === null ? "default" : `default: ${textOf(value)}`;
}

const limits = ({ range }: Option) => (range ? `Allowed: ${range}.` : "");

function defaultOf(option: Option): string | undefined {
  const { default: value, default_of_adapters: ofAdapters } = option;
  if (ofAdapters !== undefined) return `${short(ofAdapters)} of adapters, else ${short(value as number)}`;
  return value === null ? "none" : typeof value === "number" ? short(value) : textOf(value);
}

const short = (value: number) => (value && Math.abs(value) < 1e-3 ? value.toExponential() : String(value));

/** The words of the API, in which names stand between backticks. */
export function Prose({ text }: { text: string }) {
  return <>{text.split("`").map((part, place) => (place % 2 ? <code>{part}</code> : part))}</>;
}
