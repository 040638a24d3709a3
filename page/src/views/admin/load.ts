/** What several views of the administration ask for. */

import { api, ask, type Key, type Project } from "../../api/client";

export const CONFIGURED_KEY = "key_configured"; // the key of the service's settings, which is in no list
const MOST = 100;

/** The newest projects that the reader's key manages. */
export async function loadProjects(signal: AbortSignal): Promise<Project[]> {
  return (await ask(api.GET("/v1/x/projects", { params: { query: { limit: MOST } }, signal }))).data;
}

/** The names of the newest keys, by id. */
export async function loadKeyNames(signal: AbortSignal): Promise<Map<string, string>> {
  const keys: Key[] = (await ask(api.GET("/v1/x/keys", { params: { query: { limit: MOST } }, signal }))).data;
  return new Map([[CONFIGURED_KEY, "the key of the settings"], ...keys.map((key): [string, string] => [key.id, key.name])]);
}
