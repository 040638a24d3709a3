/** The view and its state stand in the fragment of the address, such as `#/jobs/ftjob-1?from=10`.
 *
 * A browser does not send the fragment, so no log of a server or a proxy holds it. */

import { signal } from "@preact/signals";

export interface Route {
  path: string[];
  query: URLSearchParams;
}

export type Query = Record<string, string | number | null | undefined>;

export const route = signal<Route>(read());
window.addEventListener("hashchange", () => {
  route.value = read();
});

function read(): Route {
  const [path = "", query = ""] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const parts = path.split("/").filter(Boolean);
  try {
    return { path: parts.map(decodeURIComponent), query: new URLSearchParams(query) };
  } catch {
    return { path: parts, query: new URLSearchParams(query) }; // a lone % is no escape
  }
}

export function href(path: string | string[], query: Query = {}): string {
  const parts = typeof path === "string" ? [path] : path;
  const given = Object.entries(query).filter(([, value]) => value != null && value !== "");
  const written = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  return `#/${parts.map(encodeURIComponent).join("/")}${written && `?${written}`}`;
}

/** Changes a part of the view's state. An empty value leaves the name out. */
export function setQuery(changes: Query, { replaces = false } = {}) {
  const next = href(route.value.path, { ...Object.fromEntries(route.value.query), ...changes });
  if (next === location.hash) return;
  if (!replaces) {
    location.hash = next;
    return;
  }
  history.replaceState(null, "", next);
  route.value = read();
}
