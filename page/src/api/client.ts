/** The client of the service's own API. Its types are made of the service's OpenAPI document. */

import createClient from "openapi-fetch";
import type { components, paths } from "./schema";
import { forget, remember, session, type Session } from "../parts/session/session";

type Documents = components["schemas"];
export type Job = Documents["JobDocument"];
export type JobEvent = Documents["EventDocument"];
export type Checkpoint = Documents["CheckpointDocument"];
export type Metrics = Documents["MetricsDocument"];
export type Column = Documents["Column"];
export type Model = Documents["ModelDocument"];
export type Deployment = Documents["DeploymentDocument"];
export type DeploymentSettings = Documents["DeploymentSettings"];
export type Permission = Documents["PermissionDocument"];
export type Key = Documents["KeyDocument"];
export type NewKey = Documents["NewKeyDocument"];
export type Project = Documents["ProjectDocument"];
export type Webhook = Documents["WebhookDocument"];
export type NewWebhook = Documents["NewWebhookDocument"];
export type Usage = Documents["UsageDocument"];
export type AuditEntry = Documents["AuditDocument"];
export type CreateFeedback = Documents["CreateFeedback"];
export type FeedbackCount = Documents["CountDocument"];
export type TrainingFile = Documents["FileDocument"];
export type FileRow = Documents["RowDocument"];
export type FileCheck = Documents["CheckDocument"];
export type FileReport = Documents["FeedbackReport"];
export type Method = Documents["MethodDocument"];
export type Option = Documents["OptionDocument"];
export type Evaluation = Documents["EvaluationDocument"];
export type EvaluationItem = Documents["EvaluationItemDocument"];
export type Rounds = Documents["RoundsDocument"];
export type Round = Documents["RoundDocument"];
export type Sweep = Documents["SweepDocument"];
export type Trial = Documents["TrialDocument"];
export type Frontier = Documents["FrontierDocument"];
export type FrontierPoint = Documents["FrontierPoint"];
export type CreateEvaluation = Documents["CreateEvaluation"];
export type CreateRounds = Documents["CreateRounds"];
export type CreateSweep = Documents["CreateSweep"];
export type Judged = Documents["JudgedDocument"];
export type Rewards = Documents["RewardsList"];
export type CreateRewards = Documents["RewardsBody"];
export type Plan = Documents["PlanDocument"];

type Token = Documents["TokenDocument"];

/** For the routes that need no token. */
export const open = createClient<paths>({ baseUrl: location.origin });

export const api = createClient<paths>({ baseUrl: location.origin });
api.use({
  async onRequest({ request }) {
    request.headers.set("authorization", await bearer());
    return request;
  },
});

const RENEWED_SECONDS = 30; // a token is replaced when it is valid for less than this
let renewing: Promise<void> | undefined; // requests that come meanwhile wait for it

/** Returns the header `Authorization` of the next request. A token that is about to expire is replaced before that. */
export async function bearer(): Promise<string> {
  const issued = session.value?.issued;
  if (issued?.refreshToken && issued.expiresAt - Date.now() / 1000 < RENEWED_SECONDS) {
    renewing ??= renew(issued.refreshToken).finally(() => (renewing = undefined));
    await renewing;
  }
  return `Bearer ${session.value?.token ?? ""}`;
}

async function renew(refreshToken: string) {
  const isCurrent = () => session.value?.issued?.refreshToken === refreshToken; // not if the reader signs out meanwhile
  try {
    const told = await ask(open.POST("/v1/x/sign-in/refresh", { body: { refresh_token: refreshToken } }));
    if (isCurrent()) remember(sessionOf(told));
  } catch (error) {
    if (isCurrent() && error instanceof Failure && error.status === 401) forget({ byItself: true });
    throw error;
  }
}

export function sessionOf({ token, name, expires_at, refresh_token }: Token): Session {
  return { token, issued: { name, expiresAt: expires_at, refreshToken: refresh_token } };
}

/** Why a request failed, in the words of the service, or in our own if it did not answer. */
export class Failure extends Error {
  constructor(
    message: string,
    readonly status?: number, // undefined: no answer came
    readonly param?: string | null, // the path of the field that is refused
    readonly code?: string | null,
  ) {
    super(message);
  }

  static of(error: unknown): Failure {
    if (error instanceof Failure) return error;
    return new Failure("The service does not answer. Check that it runs and that you are online.");
  }

  static answered(status: number, body: unknown): Failure {
    const told = (body as { error?: { message?: string; param?: string; code?: string } } | undefined)?.error;
    return new Failure(told?.message ?? `The service answered with status ${status}.`, status, told?.param, told?.code);
  }
}

/** Returns the body of an answer, or throws a Failure. */
export async function ask<Body>(
  asked: Promise<{ data?: Body; error?: unknown; response: Response }>,
): Promise<NonNullable<Body>> {
  const { data, error, response } = await asked;
  if (data === undefined || data === null) throw Failure.answered(response.status, error);
  return data;
}
