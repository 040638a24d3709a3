import type { JSX } from "preact";
import { href } from "../../parts/route/route";
import { Audit } from "./audit";
import { Keys } from "./keys";
import { Project } from "./project";
import { Projects } from "./projects";
import { Usage } from "./usage";
import { Webhooks } from "./webhooks";

const PARTS: { name: string; title: string; show: (id?: string) => JSX.Element }[] = [
  { name: "keys", title: "Keys", show: () => <Keys /> },
  { name: "projects", title: "Projects", show: (id) => (id ? <Project key={id} id={id} /> : <Projects />) },
  { name: "webhooks", title: "Webhooks", show: () => <Webhooks /> },
  { name: "usage", title: "Usage", show: () => <Usage /> },
  { name: "audit", title: "Audit", show: () => <Audit /> },
];

/** What an admin's key may see and do. */
export function Admin({ rest: [name = "keys", id] }: { rest: string[] }) {
  const part = PARTS.find((each) => each.name === name);
  return (
    <>
      <nav class="parts" aria-label="Parts of the administration">
        {PARTS.map((each) => (
          <a href={href(["admin", each.name])} aria-current={each === part ? "page" : undefined}>
            {each.title}
          </a>
        ))}
      </nav>
      {part ? part.show(id) : <p class="note">There is no such view. Choose one above.</p>}
    </>
  );
}
