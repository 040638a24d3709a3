"""Tests lm_eval against a served model: its accuracies, log-probabilities and answers are those of a plain forward."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.rows import Shop
from tests.clients import installed
from tests.e2e.conftest import Service
from tests.e2e.test_rewards import trained

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1800)]

NUM_TOKENS = 6
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
"""
CHOICES = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ANSWERS = f"""
output_type: generate_until
generation_kwargs: {{until: ["\\n"], max_gen_toks: {NUM_TOKENS}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ROWS = list(Shop(num_things=8, num_held_out=8).pairs(12))


class Plain:
    """Computes log-probabilities and answers with transformers, one sequence at a time."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        if adapter:
            self.model = PeftModel.from_pretrained(self.model, adapter)

    @torch.no_grad()
    def logp(self, prompt: str, completion: str) -> float:
        ids = torch.tensor(self.tokenizer(prompt + completion).input_ids)
        begin = len(self.tokenizer(prompt).input_ids)
        logps = self.model(ids[None]).logits[0, :-1].log_softmax(-1)
        return float(logps[range(begin - 1, len(ids) - 1), ids[begin:]].sum())

    def answer(self, prompt: str) -> str:
        """Returns the most likely answer, up to NUM_TOKENS tokens or the end of the line.

        Leaves out a last character whose bytes are not complete, as vLLM does.
        """
        ids = torch.tensor([self.tokenizer(prompt).input_ids])
        out = self.model.generate(input_ids=ids, do_sample=False, max_new_tokens=NUM_TOKENS)[0, ids.shape[1] :]
        return str(self.tokenizer.decode(out, skip_special_tokens=True)).partition("\n")[0].rstrip("\ufffd")

    def chat(self, question: str) -> str:
        said = [{"role": "user", "content": question}]
        return self.answer(self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))


def write_task(folder: Path, name: str, kind: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / f"{name}.yaml").write_text(COMMON.format(name=name) + kind)


def write_answers(folder: Path, answers: list[str]) -> None:
    """Writes a task of whose targets the even ones are these answers, and the odd ones are not."""
    rows = [
        {"question": prompt, "target": answer if number % 2 == 0 else f"{answer}?"}
        for number, ((prompt, _, _), answer) in enumerate(zip(ROWS, answers, strict=True))
    ]
    write_task(folder, "answers", ANSWERS, rows)


def evaluate(service: Service, model: str, folder: Path, tasks: str, *options: str) -> tuple[dict[str, Any], Any]:
    """Runs the command in the folder of the tasks. Returns lm_eval's results by task, and a function that reads what
    the model answered in a task, in the order of the rows."""
    command = [str(Path(sys.executable).with_name("raydpo")), "evaluations", "lm-eval", model, "--tasks", tasks]
    path = os.pathsep.join([str(installed.lm_eval()), os.environ["PATH"]])
    environment = os.environ | {"RAYDPO_HOME": str(service.home), "RAYDPO_URL": f"{service.url}/v1", "PATH": path}
    subprocess.run([*command, *options, "--", "--include_path", "."], cwd=folder, env=environment, check=True)
    (found,) = (folder / "lm-eval").glob("*/results_*.json")

    def samples(task: str) -> Iterator[Any]:
        (file,) = (folder / "lm-eval").glob(f"*/samples_{task}_*.jsonl")
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        return (row["resps"] for row in rows)

    return json.loads(found.read_text())["results"], samples


def test_with_a_tokenizer_choices_and_answers_of_a_policy_are_those_of_a_plain_forward(
    service: Service, client: openai.OpenAI, tmp_path: Path
) -> None:
    base, adapter = service.models["tiny"], {"type": "lora", "r": 8}
    job = trained(client, "dpo", {}, adapter=adapter, precision="float32")
    plain = Plain(base, service.home / "storage" / "runs" / job.id / "export")
    logps = [[plain.logp(prompt, f" {choice}") for choice in choices] for prompt, *choices in ROWS]
    best = [max(range(2), key=row.__getitem__) for row in logps]
    rows = [
        {"question": prompt, "choices": choices, "target": best[number] if number % 3 else 1 - best[number]}
        for number, (prompt, *choices) in enumerate(ROWS)
    ]
    write_task(tmp_path, "choices", CHOICES, rows)
    answers = [plain.answer(prompt) for prompt, _, _ in ROWS]
    write_answers(tmp_path, answers)
    results, samples = evaluate(service, job.fine_tuned_model, tmp_path, "choices,answers", "--tokenizer", str(base))
    assert results["choices"]["acc,none"] == pytest.approx(8 / 12)
    assert results["answers"]["exact_match,none"] == 0.5
    found = [[float(choice[0][0]) for choice in row] for row in samples("choices")]
    assert found == [pytest.approx(row, abs=1e-3) for row in logps]
    untrained = Plain(base)
    assert untrained.logp(ROWS[0][0], f" {ROWS[0][1]}") != pytest.approx(logps[0][0], abs=1e-2)  # it has learned
    assert [row[0][0] for row in samples("answers")] == answers


def test_without_a_tokenizer_answers_are_those_of_the_chat(service: Service, tmp_path: Path) -> None:
    plain = Plain(service.models["tiny"])
    answers = [plain.chat(prompt) for prompt, _, _ in ROWS]
    write_answers(tmp_path, answers)
    results, samples = evaluate(service, "tiny", tmp_path, "answers")
    assert results["answers"]["exact_match,none"] == 0.5
    assert [row[0][0] for row in samples("answers")] == answers
