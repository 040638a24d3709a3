// The round of acceptance.py with OpenAI's client for Node: `acceptance.mjs MODEL`, in the same environment.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { setTimeout as sleep } from "node:timers/promises";
import OpenAI, { toFile } from "openai";
import { VERSION } from "openai/version";

const ENDED = ["succeeded", "failed", "cancelled"];
const model = process.argv[2];
const client = new OpenAI();
const jobs = client.fineTuning.jobs;
const messages = [{ role: "user", content: "Where do I find a red saw?" }];

function pairs(count) {
  const rows = Array.from({ length: count }, (_, number) => ({
    input: { messages: [{ role: "user", content: `Where do I find saw ${number}?` }] },
    preferred_output: [{ role: "assistant", content: `In aisle ${number}, on the left.` }],
    non_preferred_output: [{ role: "assistant", content: "No idea." }],
  }));
  return rows.map((row) => JSON.stringify(row)).join("\n");
}

const dpo = (hyperparameters = {}) => ({ type: "dpo", dpo: { hyperparameters: { batch_size: 4, ...hyperparameters } } });

async function waitFor(look, what, seconds = 400) {
  for (const deadline = Date.now() + seconds * 1000; Date.now() < deadline; await sleep(200)) {
    const found = await look();
    if (found) return found;
  }
  throw new Error(`${what}: not within ${seconds} s`);
}

async function all(pages) {
  const found = [];
  for await (const item of pages) found.push(item);
  return found;
}

async function refused(kind, call) {
  const error = await call().then(() => null, (reason) => reason);
  assert(error instanceof kind, `${kind.name} was not raised, but ${error}`);
  assert(error.requestID && error.message);
  return error;
}

async function files() {
  const data = pairs(24);
  const file = await client.files.create({ file: await toFile(Buffer.from(data), "pairs.jsonl"), purpose: "fine-tune" });
  assert.equal((await client.files.waitForProcessing(file.id, { pollInterval: 100 })).status, "processed");
  assert.equal(await (await client.files.content(file.id)).text(), data);
  assert((await all(client.files.list({ purpose: "fine-tune", limit: 2 }))).some(({ id }) => id === file.id));

  const brief = await client.files.create({
    file: await toFile(Buffer.from(data), "brief.jsonl"),
    purpose: "fine-tune",
    expires_after: { anchor: "created_at", seconds: 3600 },
  });
  assert.equal(brief.expires_at, brief.created_at + 3600);
  assert((await client.files.delete(brief.id)).deleted);
  await refused(OpenAI.NotFoundError, () => client.files.retrieve(brief.id));
  return file.id;
}

async function uploads() {
  const data = Buffer.from(pairs(40));
  const about = { filename: "large.jsonl", bytes: data.length, mime_type: "application/jsonl", purpose: "fine-tune" };
  const upload = await client.uploads.create(about);
  const halves = [data.subarray(0, 3000), data.subarray(3000)];
  const parts = await Promise.all(
    halves.map(async (half) => client.uploads.parts.create(upload.id, { data: await toFile(half, "part") })),
  );
  const done = await client.uploads.complete(upload.id, { part_ids: parts.map(({ id }) => id) });
  assert.equal(done.status, "completed");
  assert.equal(await (await client.files.content(done.file.id)).text(), data.toString());
  assert.equal((await client.uploads.cancel((await client.uploads.create(about)).id)).status, "cancelled");
}

async function hooks(received) {
  const endpoint = await client.webhooks.create({
    name: "acceptance",
    url: `http://127.0.0.1:${process.env.HOOKS_PORT}/hooks`,
    event_types: ["fine_tuning.job.succeeded"],
  });
  assert((await all(client.webhooks.list({ limit: 1 }))).some(({ id }) => id === endpoint.id));
  assert.equal((await client.webhooks.update(endpoint.id, { name: "renamed" })).name, "renamed");
  const { signing_secret: secret } = await client.webhooks.rotateSecret(endpoint.id);
  assert.notEqual(secret, endpoint.signing_secret);
  const test = await client.webhooks.test(endpoint.id, { event_type: "fine_tuning.job.succeeded" });
  assert.equal(test.status_code, 200);
  return async (jobId) => {
    await waitFor(async () => {
      const events = received.map(({ body, headers }) => client.webhooks.unwrap(body, headers, secret));
      return (await Promise.all(events)).some(({ type, data }) => type.endsWith(".succeeded") && data.id === jobId);
    }, "the webhook", 60);
    const { body, headers } = received.at(-1);
    await assert.rejects(() => client.webhooks.unwrap(`${body} `, headers, secret), OpenAI.InvalidWebhookSignatureError);
    await client.webhooks.delete(endpoint.id);
  };
}

async function succeeded(fileId) {
  const { id } = await jobs.create({
    model, training_file: fileId, method: dpo({ beta: 0.1 }), seed: 7, suffix: "round", metadata: { team: "shop" },
  });
  await waitFor(async () => ENDED.includes((await jobs.retrieve(id)).status), `${id} ends`);
  const job = await jobs.retrieve(id);
  assert.equal(job.status, "succeeded");
  assert.deepEqual([job.seed, job.error, job.metadata], [7, null, { team: "shop" }]);
  assert(job.trained_tokens > 0 && job.finished_at > 0);
  return job;
}

async function lists(job) {
  assert((await all(jobs.list({ limit: 1 }))).some(({ id }) => id === job.id));
  assert((await all(jobs.list({ metadata: { team: "shop" } }))).some(({ id }) => id === job.id));
  const events = await all(jobs.listEvents(job.id, { limit: 4 }));
  assert(events.length > 4 && new Set(events.map(({ id }) => id)).size === events.length);
  const steps = events.filter(({ type }) => type === "metrics").map(({ data }) => data.step).reverse();
  const rows = (await (await client.files.content(job.result_files[0])).text()).trim().split("\n");
  assert(rows[0].startsWith("step,train_loss"));
  assert.deepEqual(rows.slice(1).map((row) => Number(row.split(",")[0])), steps);
  const oldest = (await all(jobs.checkpoints.list(job.id, { limit: 1 }))).at(-1);
  assert(oldest.fine_tuned_model_checkpoint.endsWith(`:ckpt-step-${oldest.step_number}`));
  return oldest.fine_tuned_model_checkpoint;
}

async function asked(policy, checkpoint) {
  for (const name of [policy, checkpoint]) {
    assert.equal((await client.models.retrieve(name)).id, name);
    const answer = await client.chat.completions.create({ model: name, messages, max_tokens: 8, temperature: 0 });
    assert(answer.model === name && answer.usage.completion_tokens > 0);
  }
  const body = { model: policy, messages, max_tokens: 8, temperature: 0 };
  const plain = await client.chat.completions.create(body);
  const chunks = await all(await client.chat.completions.create({ ...body, stream: true }));
  const text = chunks.map(({ choices }) => choices[0]?.delta.content ?? "").join("");
  assert.equal(text, plain.choices[0].message.content ?? "");
}

async function wishes(fileId) {
  const { id } = await jobs.create({ model, training_file: fileId, method: dpo({ n_epochs: 50, batch_size: 1 }) });
  const stepped = async () => (await all(jobs.listEvents(id))).some(({ type }) => type === "metrics");
  await waitFor(stepped, "the first step");
  await jobs.pause(id);
  await waitFor(async () => (await jobs.retrieve(id)).status === "paused", "the pause");
  assert.equal((await jobs.resume(id)).status, "queued");
  await jobs.cancel(id);
  await waitFor(async () => (await jobs.retrieve(id)).status === "cancelled", "the end");
  await refused(OpenAI.BadRequestError, () => jobs.cancel(id));
}

async function errors(fileId) {
  const stranger = client.withOptions({ apiKey: "sk-nobody" });
  assert.equal((await refused(OpenAI.AuthenticationError, () => stranger.models.list())).code, "invalid_api_key");
  assert.equal((await refused(OpenAI.NotFoundError, () => client.models.retrieve("absent"))).code, "model_not_found");
  const body = { model, training_file: fileId, method: dpo({ bta: 1 }) };
  const strange = await refused(OpenAI.BadRequestError, () => jobs.create(body));
  assert.deepEqual([strange.param, strange.code], ["method.dpo.hyperparameters.bta", "unknown_parameter"]);
  assert((await client.models.list().asResponse()).headers.get("x-request-id"));
}

async function resent() {
  const flaky = () => new OpenAI({ baseURL: process.env.FLAKY_BASE_URL, defaultHeaders: { connection: "close" } });
  const before = (await all(client.files.list())).map(({ id }) => id);
  const upload = { file: await toFile(Buffer.from(pairs(12)), "resent.jsonl"), purpose: "fine-tune" };
  const file = await flaky().files.create(upload);
  assert.deepEqual((await all(client.files.list())).map(({ id }) => id), [file.id, ...before]);
  const known = (await all(jobs.list())).map(({ id }) => id);
  const job = await flaky().fineTuning.jobs.create({ model, training_file: file.id, method: dpo() });
  assert.deepEqual((await all(jobs.list())).map(({ id }) => id), [job.id, ...known]);
  await jobs.cancel(job.id);
}

async function deleted(policy) {
  assert((await client.models.delete(policy)).deleted);
  await refused(OpenAI.NotFoundError, () => client.models.retrieve(policy));
}

const received = [];
const receiver = createServer(async (request, answer) => {
  const chunks = await all(request);
  received.push({ body: Buffer.concat(chunks).toString(), headers: request.headers });
  answer.end();
}).listen(Number(process.env.HOOKS_PORT), "127.0.0.1");

const fileId = await files();
await uploads();
const told = await hooks(received);
const job = await succeeded(fileId);
await told(job.id);
await asked(job.fine_tuned_model, await lists(job));
await wishes(fileId);
await errors(fileId);
await resent();
await deleted(job.fine_tuned_model);
receiver.close();
receiver.closeAllConnections();
console.log(`openai ${VERSION}: all passed`);
