/** What the service tells of jobs before there is one: its methods with their options, and its models. */

import { api, ask, type FileReport, type Method, type Option } from "../../api/client";
import type { Draft } from "../form/draft";
import { loadModels } from "../form/models";

export interface Known {
  methods: Method[];
  options: Record<string, Option>;
  models: string[];
}

export type Kind = FileReport["kind"] | undefined; // of the rows of a training file

const SUGGESTED: Record<NonNullable<Kind>, string> = {
  demonstrations: "supervised",
  pairs: "dpo",
  rankings: "dpo",
  ratings: "dpo",
  unpaired: "kto",
};

export async function loadKnown(signal: AbortSignal): Promise<Known> {
  const [methods, options, models] = await Promise.all([
    ask(api.GET("/v1/x/methods", { signal })),
    ask(api.GET("/v1/x/options", { signal })),
    loadModels(signal),
  ]);
  return {
    methods: methods.data,
    options: Object.fromEntries(options.data.map(({ id, ...option }) => [id, option])),
    models,
  };
}

/** What the draft says, with what is chosen where it says nothing. */
export function completed(draft: Draft, known: Known, kind: Kind): Draft {
  const chosen: Draft = { "method.type": (kind && SUGGESTED[kind]) ?? "dpo" };
  if (known.models[0]) chosen.model = known.models[0];
  return { ...chosen, ...draft };
}
