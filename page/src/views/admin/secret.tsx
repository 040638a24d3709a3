import { useEffect, useRef, useState } from "preact/hooks";

interface Props {
  title: string;
  what: string; // such as "key"
  value: string;
  onDone: () => void;
}

/** A text that the service tells once, which is shown here and nowhere else. */
export function Secret({ title, what, value, onDone }: Props) {
  const field = useRef<HTMLInputElement>(null);
  const [said, setSaid] = useState("");
  useEffect(() => field.current?.focus(), []);

  async function copy() {
    field.current!.select();
    try {
      await navigator.clipboard.writeText(value);
      setSaid(`The ${what} is copied.`);
    } catch {
      setSaid(`The browser does not let the page copy. The ${what} is selected: press Ctrl and C.`); // only on https
    }
  }

  return (
    <section class="panel" aria-label={`The new ${what}`}>
      <h2>{title}</h2>
      <label for="secret">This is the only time that it is shown. Copy it to where it is needed.</label>
      <input id="secret" ref={field} readOnly value={value} class="id" onFocus={(event) => event.currentTarget.select()} />
      <div class="acts">
        <button class="main" onClick={copy}>
          Copy
        </button>
        <button onClick={onDone}>Done</button>
        <span role="status">{said}</span>
      </div>
    </section>
  );
}
