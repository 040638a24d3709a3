import { render } from "preact";
import { App } from "./app/app";
import "./sheet.css";

render(<App />, document.getElementById("page")!);
