import type { ComponentChildren } from "preact";
import { useEffect, useState } from "preact/hooks";
import { Failure } from "../../api/client";
import { href } from "../route/route";
import { forget, isSignedIn } from "../session/session";
import { visible } from "../words/words";

const FRESH_MS = 3000;

export interface Loaded<Value> {
  value?: Value; // stays while it is loaded anew
  failure?: Failure;
  isLoading: boolean;
  again: () => void;
}

/** Loads a value when the view opens, when `keys` change, and each time that `again` is called. */
export function useLoaded<Value>(load: (signal: AbortSignal) => Promise<Value>, keys: unknown[]): Loaded<Value> {
  const [state, setState] = useState<{ value?: Value; failure?: Failure; keys?: string; turn?: number }>({});
  const [turn, setTurn] = useState(0);
  const now = JSON.stringify(keys);
  useEffect(() => {
    const leaving = new AbortController();
    load(leaving.signal).then(
      (value) => !leaving.signal.aborted && setState({ value, keys: now, turn }),
      (error) =>
        !leaving.signal.aborted &&
        setState((last) => ({ ...(last.keys === now && last), failure: Failure.of(error), keys: now, turn })),
    );
    return () => leaving.abort();
  }, [now, turn]);
  const isLoading = state.keys !== now || state.turn !== turn;
  return { ...(state.keys === now && state), isLoading, again: () => setTurn((last) => last + 1) };
}

/** Loads again a few seconds after each load while the page is looked at, as long as `lives`.
 *
 * A key that is not accepted, and an object that is not there, stay so. */
export function useFresh({ isLoading, failure, again }: Loaded<unknown>, lives = true) {
  const waits = lives && !isLoading && failure?.status !== 401 && failure?.status !== 404;
  useEffect(() => {
    if (!waits) return;
    const timer = setInterval(() => !document.hidden && again(), FRESH_MS);
    return () => clearInterval(timer);
  }, [waits]);
}

interface ShowProps<Value> {
  of: Loaded<Value>;
  list?: string; // the view that lists such values, for a reader whose link leads to none
  children: (value: Value) => ComponentChildren;
}

/** Shows a loaded value; before that, that it is being loaded, or why it could not be. */
export function Show<Value>({ of, list, children }: ShowProps<Value>) {
  return (
    <>
      {of.failure && <FailureNote failure={of.failure} again={of.again} list={list} />}
      {of.value !== undefined ? children(of.value) : !of.failure && <p class="note">Loading…</p>}
    </>
  );
}

interface NoteProps {
  failure: Failure;
  again?: () => void;
  list?: string;
}

export function FailureNote({ failure, again, list }: NoteProps) {
  const isGone = failure.status === 404 && list !== undefined;
  return (
    <div class="failure" role="alert">
      <p>
        {isGone && "What this link leads to was deleted, or it never existed. "}
        {visible(failure.message)}
      </p>
      {isGone ? (
        <a href={href(list)}>See all {list}</a>
      ) : failure.status === 401 && isSignedIn.value ? (
        <button type="button" onClick={() => forget()}>
          Sign in again
        </button>
      ) : (
        again && (
          <button type="button" onClick={again}>
            Try again
          </button>
        )
      )}
    </div>
  );
}
