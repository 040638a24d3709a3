/** Who the reader is: the token that goes with each request. It is an API key, or an ID token of the issuer.
 *
 * It is kept until the tab is closed; a key is kept for longer if the reader asks for that. */

import { computed, signal } from "@preact/signals";

export interface Session {
  token: string;
  issued?: { name: string; expiresAt: number; refreshToken: string | null }; // undefined: the token is a key
}

const NAME = "raydpo session";

export const session = signal<Session | null>(kept());
export const isSignedIn = computed(() => session.value !== null);
export const hasEnded = signal(false); // by itself: the issuer did not renew it

function kept(): Session | null {
  const text = sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME);
  return text === null ? null : (JSON.parse(text) as Session);
}

export function remember(value: Session, isKept = false) {
  (isKept ? localStorage : sessionStorage).setItem(NAME, JSON.stringify(value));
  session.value = value;
}

/** `byItself` says that the reader did not ask for this. */
export function forget({ byItself = false } = {}) {
  sessionStorage.removeItem(NAME);
  localStorage.removeItem(NAME);
  session.value = null;
  hasEnded.value = byItself;
}
