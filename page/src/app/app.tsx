import type { JSX } from "preact";
import { useEffect } from "preact/hooks";
import { forget, isSignedIn, session } from "../parts/session/session";
import { href, route } from "../parts/route/route";
import { SignIn } from "../views/sign-in/sign-in";
import { Jobs } from "../views/jobs/jobs";
import { Job } from "../views/job/job";
import { Compare } from "../views/compare/compare";
import { Data } from "../views/data/data";
import { File } from "../views/data/file";
import { NewJob } from "../views/new-job/new-job";
import { Admin } from "../views/admin/admin";
import { Ask } from "../views/ask/ask";
import { Evaluation } from "../views/evaluations/evaluation";
import { Evaluations } from "../views/evaluations/evaluations";
import { NewEvaluation } from "../views/evaluations/new-evaluation";
import { Model } from "../views/models/model";
import { Models } from "../views/models/models";
import { Rewards } from "../views/models/rewards";
import { Settings } from "../views/models/settings";
import { AllRounds } from "../views/rounds/all-rounds";
import { NewRounds } from "../views/rounds/new-rounds";
import { Rounds } from "../views/rounds/rounds";
import { NewSweep } from "../views/sweeps/new-sweep";
import { Sweep } from "../views/sweeps/sweep";
import { Sweeps } from "../views/sweeps/sweeps";
import { visible } from "../parts/words/words";

interface View {
  name: string; // the first part of the path
  title: string;
  show: (rest: string[]) => JSX.Element;
}

const VIEWS: View[] = [
  { name: "jobs", title: "Jobs", show: ([id]) => showJobs(id) },
  { name: "data", title: "Data", show: ([id]) => (id ? <File key={id} id={id} /> : <Data />) },
  { name: "ask", title: "Ask", show: () => <Ask /> },
  { name: "models", title: "Models", show: ([id, part]) => showModels(id, part) },
  {
    name: "evaluations",
    title: "Evaluations",
    show: ([id]) => (id === "new" ? <NewEvaluation /> : id ? <Evaluation key={id} id={id} /> : <Evaluations />),
  },
  {
    name: "rounds",
    title: "Rounds",
    show: ([id]) => (id === "new" ? <NewRounds /> : id ? <Rounds key={id} id={id} /> : <AllRounds />),
  },
  {
    name: "sweeps",
    title: "Sweeps",
    show: ([id]) => (id === "new" ? <NewSweep /> : id ? <Sweep key={id} id={id} /> : <Sweeps />),
  },
  { name: "admin", title: "Admin", show: (rest) => <Admin rest={rest} /> },
];

function showModels(id?: string, part?: string) {
  if (!id) return <Models />;
  if (part === "settings") return <Settings key={id} id={id} />;
  return part === "rewards" ? <Rewards key={id} id={id} /> : <Model key={id} id={id} />;
}

function showJobs(id?: string) {
  if (id === "new") return <NewJob />;
  if (id === "compare") return <Compare />;
  return id ? <Job key={id} id={id} /> : <Jobs />;
}

export function App() {
  const [name = "jobs", ...rest] = route.value.path;
  const view = VIEWS.find((each) => each.name === name);
  const title = isSignedIn.value ? (view?.title ?? "Not found") : "Sign in";
  useEffect(() => {
    document.title = `${[rest[0], title].filter(Boolean).join(" · ")} · raydpo`;
  }, [title, rest[0]]);
  if (!isSignedIn.value) return <SignIn />;
  return (
    <>
      <a class="skip" href="#main" onClick={toMain}>
        Skip to the content
      </a>
      <header class="bar">
        <a class="brand" href={href("jobs")}>
          raydpo
        </a>
        <nav aria-label="Views">
          {VIEWS.map((each) => (
            <a href={href(each.name)} aria-current={each.name === name ? "page" : undefined}>
              {each.title}
            </a>
          ))}
        </nav>
        {session.value?.issued && <span class="who">{visible(session.value.issued.name)}</span>}
        <button class="quiet" onClick={() => forget()}>
          Sign out
        </button>
      </header>
      <main id="main" tabIndex={-1}>
        {view ? view.show(rest) : <NotFound />}
      </main>
    </>
  );
}

/** The fragment of the address holds the view, so the link must not change it. */
function toMain(event: Event) {
  event.preventDefault();
  document.getElementById("main")?.focus();
}

function NotFound() {
  return (
    <p class="note">
      There is no such view. Go to the <a href={href("jobs")}>jobs</a>.
    </p>
  );
}
