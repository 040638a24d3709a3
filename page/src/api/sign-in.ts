/** Signs in at the issuer, by the authorization code flow with PKCE. The service exchanges the code.
 *
 * What must outlive the way to the issuer and back is kept in the tab. */

import { ask, Failure, open, sessionOf } from "./client";
import type { Session } from "../parts/session/session";

interface Pending {
  state: string;
  nonce: string;
  verifier: string;
  view: string; // the fragment of the address, where the reader goes on
}

const NAME = "raydpo sign-in";
const redirectUri = `${location.origin}/`;

/** What the issuer sent the reader back with, if it has. It is taken out of the address at once. */
const returned = takeReturned();

function takeReturned(): URLSearchParams | null {
  const query = new URLSearchParams(location.search);
  if (!query.has("state")) return null;
  history.replaceState(null, "", location.pathname + location.hash);
  return query;
}

export const hasReturned = returned !== null;

/** Returns whether there is an issuer to sign in at. */
export async function hasIssuer(): Promise<boolean> {
  return (await ask(open.GET("/v1/x/sign-in"))).oidc !== null;
}

/** Leaves the page for the issuer's. */
export async function leaveForIssuer() {
  if (!crypto.subtle) throw new Failure("To sign in at the issuer, open this page by https://.");
  const { oidc } = await ask(open.GET("/v1/x/sign-in"));
  if (!oidc) throw new Failure("There is no issuer to sign in at. Use an API key.");
  const pending: Pending = { state: random(), nonce: random(), verifier: random(), view: location.hash };
  sessionStorage.setItem(NAME, JSON.stringify(pending));
  const hashed = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(pending.verifier));
  const address = new URL(oidc.authorization_endpoint);
  const asked = {
    response_type: "code",
    client_id: oidc.client_id,
    redirect_uri: redirectUri,
    scope: oidc.scope,
    state: pending.state,
    nonce: pending.nonce,
    code_challenge: base64url(new Uint8Array(hashed)),
    code_challenge_method: "S256",
  };
  for (const [name, value] of Object.entries(asked)) address.searchParams.set(name, value);
  location.assign(address);
}

/** Ends what `leaveForIssuer` began: returns the session, and goes back to the view in which it began. */
export async function returnFromIssuer(): Promise<Session> {
  const kept = sessionStorage.getItem(NAME);
  sessionStorage.removeItem(NAME);
  const pending = kept === null ? null : (JSON.parse(kept) as Pending);
  if (!pending || returned?.get("state") !== pending.state)
    throw new Failure("This sign-in did not begin in this tab. Sign in again.");
  location.hash = pending.view;
  const code = returned.get("code");
  if (!code) {
    const said = [returned.get("error"), returned.get("error_description")].filter(Boolean).join(": ");
    throw new Failure(`The issuer did not sign you in: ${said || "it gave no reason"}.`);
  }
  const { verifier, nonce } = pending;
  const body = { code, code_verifier: verifier, redirect_uri: redirectUri, nonce };
  return sessionOf(await ask(open.POST("/v1/x/sign-in/token", { body })));
}

const random = () => base64url(crypto.getRandomValues(new Uint8Array(32)));

function base64url(bytes: Uint8Array): string {
  return btoa(String.fromCharCode(...bytes))
    .replaceAll("+", "-")
    .replaceAll("/", "_")
    .replaceAll("=", "");
}
