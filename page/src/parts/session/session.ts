/** The key of the reader. It is kept until the tab is closed, or longer if the reader asks for that. */

import { signal } from "@preact/signals";

const NAME = "raydpo key";

export const key = signal<string | null>(sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME));

export function remember(value: string, isKept: boolean) {
  (isKept ? localStorage : sessionStorage).setItem(NAME, value);
  key.value = value;
}

export function forget() {
  sessionStorage.removeItem(NAME);
  localStorage.removeItem(NAME);
  key.value = null;
}
