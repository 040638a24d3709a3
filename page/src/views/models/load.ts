/** The models of the project with the state of their deployments, page by page. */

import { api, ask, type Deployment, type Model } from "../../api/client";

export interface Row {
  model: Model;
  deployment?: Deployment; // absent while the Ray cluster does not answer
}

export interface Rows {
  rows: Row[];
  trouble?: string; // why the deployments are not known
  next: string | null; // the id after which the next page begins
}

const PAGE = 25;

export async function loadRows(after: string | undefined, signal: AbortSignal): Promise<Rows> {
  const params = { query: { limit: PAGE, after } };
  const [models, deployments] = await Promise.all([
    ask(api.GET("/v1/models", { params, signal })),
    api.GET("/v1/x/deployments", { params, signal }),
  ]);
  const found = new Map(deployments.data?.data.map((each) => [each.id, each]));
  return {
    rows: models.data.map((model) => ({ model, deployment: found.get(model.id) })),
    trouble: deployments.data ? undefined : troubleOf(deployments.error),
    next: models.has_more ? models.last_id : null,
  };
}

export async function loadRow(id: string, signal: AbortSignal): Promise<Row & { trouble?: string }> {
  const params = { path: { model_id: id } };
  const [model, deployment] = await Promise.all([
    ask(api.GET("/v1/models/{model_id}", { params, signal })),
    api.GET("/v1/x/deployments/{model_id}", { params, signal }),
  ]);
  return { model, deployment: deployment.data, trouble: deployment.data ? undefined : troubleOf(deployment.error) };
}

function troubleOf(error: unknown): string {
  const told = (error as { error?: { message?: string } } | undefined)?.error?.message;
  return told ?? "The state of the models is not known.";
}
