import type { Checkpoint, Job } from "../../api/client";
import { Download } from "../../parts/download/download";
import { href } from "../../parts/route/route";
import { figure, moment, whole } from "../../parts/words/words";

export function Checkpoints({ job, checkpoints }: { job: Job; checkpoints: Checkpoint[] }) {
  return (
    <section class="panel">
      <h2>Policy and checkpoints</h2>
      {job.fine_tuned_model ? (
        <Model name={job.fine_tuned_model} base={job.model} what="The policy" />
      ) : (
        <p class="note">The policy is there once the job has succeeded. Each checkpoint is a model as well.</p>
      )}
      {checkpoints.map((each) => (
        <Model
          key={each.id}
          name={each.fine_tuned_model_checkpoint}
          base={job.model}
          what={`Step ${whole(each.step_number)}`}
          more={[lossOf(each), moment(each.created_at)].filter(Boolean).join(" · ")}
        />
      ))}
    </section>
  );
}

function lossOf({ metrics }: Checkpoint): string {
  const { full_valid_loss: valid, train_loss: train } = metrics;
  if (valid !== undefined) return `validation loss ${figure(valid)}`;
  return train === undefined ? "" : `loss ${figure(train)}`;
}

function Model({ name, base, what, more }: { name: string; base: string; what: string; more?: string }) {
  return (
    <div class="model">
      <div>
        <h3>{what}</h3>
        <a class="id" href={href(["models", name])}>
          {name}
        </a>
        {more && <small> {more}</small>}
      </div>
      <div class="acts">
        <a class="button" href={href("ask", { a: name, b: base })} aria-label={`Ask ${name}`}>
          Ask
        </a>
        <Download model={name} />
      </div>
    </div>
  );
}
