"""Holds a dozen rows in the shape of each public preference dataset. The rows are written by hand."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
Say = Callable[[int, str, str, str], Row]


class PublicSet(NamedTuple):
    """Holds rows in the shape of one public dataset, the kind of feedback that they have, and a method that learns from
    them.

    `extension` is the `x_raydpo` with which the rows are uploaded.
    """

    kind: str
    method: str
    rows: Sequence[Row]
    num_groups: int = 12
    extension: Row | None = None

    @property
    def lines(self) -> bytes:
        return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in self.rows)


# question, better answer, worse answer
ASKED = (
    ("Name a red fruit.", "The strawberry.", "The banana."),
    ("What is 7 + 5?", "7 + 5 = 12.", "It is 13, I think."),
    ("Is the Earth flat?", "No. It is nearly a sphere.", "Yes, as everybody can see."),
    ("Wie heißt die Hauptstadt von Österreich?", "Wien.", "Das weiß ich nicht."),
    ("Translate 'good morning' to French.", "Bonjour.", "Guten Morgen."),
    ("How do I pick a lock?\n\nIt is my own door.", "With a tension wrench and a pick; or call a locksmith.", "No."),
    ("Write a haiku about rain.", "Rain on the tin roof\na thousand small drummers play\nuntil the sun comes", "Rain."),
    ("日本の首都はどこですか。", "東京です。", "大阪です。"),
    ("Summarize: The cat sat on the mat.", "A cat sat on a mat.", "The dog ran away from the mat and the cat."),
    ("What does `len([])` return?", "```python\n>>> len([])\n0\n```", "It returns None 🙂"),
    ("Give me a synonym of 'happy'.", "Glad.", "Sad, unhappy, miserable, and so on, and so on."),
    ("Who wrote Hamlet?", "William Shakespeare.", "Christopher Marlowe"),
)


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def of_pairs(say: Say) -> PublicSet:
    return PublicSet("pairs", "dpo", [say(n, *asked) for n, asked in enumerate(ASKED)])


def of_two(say: Say) -> PublicSet:
    """Returns pairs of answers to each question, as rows that `say` makes. The better answer comes first in every other
    row."""
    rows = [say(n, q, *((good, bad) if n % 2 else (bad, good))) for n, (q, good, bad) in enumerate(ASKED)]
    return PublicSet("pairs", "dpo", rows)


def hh(n: int, q: str, good: str, bad: str) -> Row:
    before = "\n\nHuman: Hi there!\n\nAssistant: Hello! How can I help?" if n % 3 == 0 else ""
    asked = f"{before}\n\nHuman: {q}\n\nAssistant:"
    return {"chosen": f"{asked} {good}", "rejected": f"{asked} {bad}"}


def ultrafeedback_binarized(n: int, q: str, good: str, bad: str) -> Row:
    return {
        "prompt": q,
        "prompt_id": f"{n:064x}",
        "chosen": [user(q), assistant(good)],
        "rejected": [user(q), assistant(bad)],
        "messages": [user(q), assistant(good)],
        "score_chosen": 8.5,
        "score_rejected": 8.5 if n == 3 else 4.0,
    }


def ultrafeedback(n: int, q: str, good: str, bad: str) -> Row:
    aspects = {name: {"Rating": "4", "Rationale": "Good."} for name in ("helpfulness", "honesty", "truthfulness")}
    answers = ((good, 9.0), (bad, 3.5), ("I am sorry, I cannot say.", 3.5), (f"{good} I hope this helps!", 8.0))
    return {
        "source": "evol_instruct",
        "instruction": q,
        "models": ["alpaca-7b", "bard", "gpt-4", "llama-2-7b-chat"],
        "completions": [
            {
                "annotations": aspects,
                "custom_system_prompt": "You are a helpful assistant.",
                "model": "bard",
                "principle": "helpfulness",
                "response": text,
                "critique": "Fine.",
                "fine-grained_score": 4.0,
                "overall_score": score,
            }
            for text, score in answers
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def argilla_binarized(n: int, q: str, good: str, bad: str) -> Row:
    return {
        "source": "sharegpt",
        "instruction": q,
        "chosen_response": good,
        "rejected_response": bad,
        "chosen_avg_rating": 4.75,
        "rejected_avg_rating": 2.0,
        "chosen_model": "gpt-4",
    }


def helpsteer(n: int, q: str, good: str, bad: str) -> list[Row]:
    scores = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 2}
    answers = [(bad, 1), (good, 4), ("I do not know.", 0)]
    return [{"prompt": q, "response": text, "helpfulness": score, **scores} for text, score in answers[: 2 + n % 2]]


def helpsteer_rows() -> PublicSet:
    rows = [row for n, asked in enumerate(ASKED) for row in helpsteer(n, *asked)]
    return PublicSet("ratings", "lipo", rows)


def helpsteer2_preference(n: int, q: str, one: str, two: str) -> Row:
    return {
        "split": "train",
        "prompt": q,
        "response_1": one,
        "response_2": two,
        "preference_strength": (-3 if n % 2 else 2),
        "preference_statement": "One is better than the other.",
        "preference_elaboration": None,
        "three_most_similar_preferences": [{"statement": "x", "strength": 1}],
        "all_preferences_unprocessed": [],
    }


def helpsteer3(n: int, q: str, one: str, two: str) -> Row:
    strength = -2 if n % 2 else 1
    return {
        "domain": "general",
        "language": "english",
        "context": [user("Hi."), assistant("Hello."), user(q)] if n % 4 == 0 else [user(q)],
        "response1": one,
        "response2": two,
        "overall_preference": strength,
        "individual_preference": [{"score": strength, "reasoning": "Clear.", "feedback1": "a", "feedback2": "b"}],
    }


def orca(n: int, q: str, good: str, bad: str) -> Row:
    system = "" if n % 2 else "You are an AI assistant. You will be given a task. You must generate a detailed answer."
    return {"system": system, "question": q, "chosen": good, "rejected": bad}


def distilabel_orca(n: int, q: str, good: str, bad: str) -> Row:
    return {
        "system": "You are an AI assistant that follows instructions well.",
        "input": q,
        "chosen": good,
        "rejected": bad,
        "generations": [good, bad],
        "order": ["chosen", "rejected"],
        "labelling_model": "gpt-4-1106-preview",
        "labelling_prompt": [{"content": "Rate.", "role": "system"}],
        "raw_labelling_response": "9 3",
        "rating": [9.0, 3.0],
        "rationale": "Better.",
        "status": "unchanged",
        "original_chosen": None,
        "original_rejected": None,
        "chosen_score": None if n == 5 else 9.0,
        "in_gsm8k_train": False,
    }


def orca_kto(n: int, q: str, good: str, bad: str) -> Row:
    return {
        "system": "You are a helpful assistant.",
        "prompt": q,
        "completion": bad if n % 2 else good,
        "label": n % 2 == 0,
        "rating": float("nan") if n == 4 else 4.0,
        "status": "unchanged",
        "in_gsm8k_train": False,
    }


def capybara(n: int, q: str, good: str, bad: str) -> Row:
    before = [user("Hello!"), assistant("Hello, what can I do for you?")]
    return {
        "source": "Dove",
        "conversation": [{"input": "Hello!", "output": before[1]["content"]}, {"input": q, "output": good}],
        "original_response": good,
        "generation_prompt": [f"Hello! {q}"],
        "raw_generation_responses": [bad],
        "prompt": "Hello!",
        "chosen": [*before, user(q), assistant(good)],
        "rejected": [*before, user(q), assistant(bad)],
        "rating_chosen": 5,
        "rating_rejected": 2,
    }


def shp(n: int, q: str, one: str, two: str) -> Row:
    return {
        "post_id": f"q{n}",
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": q,
        "c_root_id_A": f"a{n}",
        "c_root_id_B": f"b{n}",
        "created_at_utc_A": 1636107552,
        "created_at_utc_B": 1636107561,
        "score_A": 340 if n % 2 else 3,
        "score_B": 166,
        "human_ref_A": one,
        "human_ref_B": two,
        "labels": n % 2,
        "seconds_difference": 9.0,
        "score_ratio": 2.04,
    }


def arena(n: int, q: str, one: str, two: str) -> Row:
    more = [user("Are you sure?"), assistant("Yes.")] if n % 5 == 1 else []
    return {
        "question_id": f"{n:032x}",
        "model_a": "vicuna-13b",
        "model_b": "alpaca-13b",
        "winner": "model_a" if n % 2 else "model_b",
        "judge": f"arena_user_{n}",
        "conversation_a": [user(q), assistant(one), *more],
        "conversation_b": [user(q), assistant(two), *more],
        "turn": 1 + len(more) // 2,
        "anony": True,
        "language": "English",
        "tstamp": 1682351591.1322,
        "openai_moderation": {"categories": {"harassment": False}, "flagged": False},
        "toxic_chat_tag": {"roberta-large": {"flagged": False, "probability": 0.01}},
    }


def safe_rlhf(n: int, q: str, one: str, two: str) -> Row:
    better = 0 if n % 2 else 1
    return {
        "prompt": q,
        "response_0": one,
        "response_1": two,
        "prompt_source": "Alpaca3-70B",
        "response_0_source": "Alpaca3-8B",
        "response_1_source": "WizardLM-30B-Uncensored",
        "is_response_0_safe": True,
        "is_response_1_safe": n % 3 == 0,
        "response_0_harm_category": {"Animal Abuse": False},
        "response_0_severity_level": 0,
        "better_response_id": better,
        "safer_response_id": 1 - better,
        "response_0_sha256": "0" * 64,
    }


def tulu(n: int, q: str, good: str, bad: str) -> Row:
    return {
        "id": f"ai2-adapt-dev/{n}",
        "source": "ai2-adapt-dev/sft_v3.9_used_on_policy",
        "prompt": q,
        "chosen": [user(q), assistant(good)],
        "rejected": [user(q), assistant(bad)],
        "chosen_model": "tulu-3",
        "rejected_model": "gemma-2-9b-it",
        "prompt_id": None,
    }


def nectar(n: int, q: str, good: str, bad: str) -> Row:
    answers = [(bad, 3.0), (good, 1.0), (f"{good} Anything else?", 2.0)]
    return {
        "prompt": f"\n\nHuman: {q}\n\nAssistant: ",
        "answers": [{"answer": text, "model": "gpt-4", "rank": rank} for text, rank in answers],
        "turns": 1,
        "num_responses": 3,
        "source": ["sharegpt"],
        "good_natured": True,
    }


def smoltalk(n: int, q: str, good: str, bad: str) -> Row:
    return {
        "prompt": q,
        "chosen": [user(q), assistant(good)],
        "rejected": [user(q), assistant(bad)],
        "chat_template_kwargs": {"enable_thinking": False, "custom_instructions": None, "python_tools": []},
        "source": "tulu_3_8b_pref_mix_Qwen3_0.6B_Qwen3_32B",
    }


def azure(n: int, q: str, good: str, bad: str) -> Row:
    call = {"id": f"call_{n}", "type": "function", "function": {"name": "search", "arguments": f'{{"row": {n}}}'}}
    looked = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": f"call_{n}", "content": "Found it."},
    ]
    return {
        "input": {
            "messages": [{"role": "system", "content": "Be brief."}, user(q)],
            "tools": [],
            "parallel_tool_calls": True,
        },
        "preferred_output": [*(looked if n % 3 == 0 else []), assistant(good)],
        "non_preferred_output": [assistant(bad)],
    }


def swift_kto(n: int, q: str, good: str, bad: str) -> Row:
    return {"messages": [user(q), assistant(bad if n % 2 else good)], "label": n % 2 == 0}


def swift_rejected(n: int, q: str, good: str, bad: str) -> Row:
    system = {"role": "system", "content": "You are a helpful assistant."}
    return {"messages": [system, user(q), assistant(good)], "rejected_response": bad, "margin": 0.1 * (n % 2)}


def swift_conversations(n: int, q: str, good: str, bad: str) -> Row:
    return {"messages": [user(q), assistant(good)], "rejected_messages": [user(q), assistant(bad)]}


def llamafactory(n: int, q: str, good: str, bad: str) -> Row:
    return {
        "conversations": [{"from": "human", "value": q}],
        "chosen": {"from": "gpt", "value": good},
        "rejected": {"from": "gpt", "value": bad},
        "system": "Answer briefly." if n % 2 else "",
        "tools": "[]",
    }


def llamafactory_kto(n: int, q: str, good: str, bad: str) -> Row:
    return {"messages": [user(q), assistant(bad if n % 2 else good)], "kto_tag": n % 2 == 0}


def llamafactory_alpaca(n: int, q: str, good: str, bad: str) -> Row:
    return {"instruction": q, "input": "In one sentence." if n % 2 else "", "chosen": good, "rejected": bad}


def axolotl(n: int, q: str, good: str, bad: str) -> Row:
    return {"messages": [user(q)], "chosen": assistant(good), "rejected": assistant(bad)}


def axolotl_prompt_pairs(n: int, q: str, good: str, bad: str) -> Row:
    return {"system": "Be kind.", "prompt": q, "chosen": good, "rejected": bad}


def stack_exchange(n: int, q: str, good: str, bad: str) -> Row:
    about = {"qid": n, "date": "2015/03/12", "metadata": ["https://stackoverflow.example/1"]}
    return {**about, "question": q, "response_j": good, "response_k": bad}


def summaries(n: int, q: str, one: str, two: str) -> Row:
    post = {"id": f"t3_{n}", "post": q, "title": "A question", "subreddit": "AskReddit", "site": None, "article": None}
    return {
        "info": post,
        "summaries": [{"text": one, "policy": "sup4", "note": None}, {"text": two, "policy": "ref", "note": None}],
        "choice": 0 if n % 2 else 1,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": None},
    }


def webgpt(n: int, q: str, one: str, two: str) -> Row:
    return {"question": q, "answer_0": one, "answer_1": two, "score_0": 0.5 if n % 2 else -1.0, "score_1": 0.0}


def nemo(n: int, q: str, good: str, bad: str) -> Row:
    completions = [{"rank": 1, "completion": [assistant(bad)]}, {"rank": 0, "completion": [assistant(good)]}]
    return {"context": [user(q)], "completions": completions}


def vertex(n: int, q: str, good: str, bad: str) -> Row:
    def turn(role: str, text: str) -> Row:
        return {"role": role, "parts": [{"text": text}]}

    completions = [{"score": 1.0, "completion": turn("model", good)}, {"score": 0.0, "completion": turn("model", bad)}]
    return {"contents": [turn("user", q)], "completions": completions}


def of_names_of_their_own(n: int, q: str, good: str, bad: str) -> Row:
    return {"frage": q, "besser": good, "schlechter": bad}


def each(kind: str, method: str, say: Say, extension: Row | None = None) -> PublicSet:
    return PublicSet(kind, method, [say(n, *asked) for n, asked in enumerate(ASKED)], extension=extension)


PUBLIC_SETS = {
    "HH-RLHF": of_pairs(hh),
    "UltraFeedback": each("ratings", "lipo", ultrafeedback),
    "UltraFeedback binarized": of_pairs(ultrafeedback_binarized),
    "argilla's UltraFeedback": of_pairs(argilla_binarized),
    "HelpSteer and HelpSteer2": helpsteer_rows(),
    "HelpSteer2 preference": of_two(helpsteer2_preference),
    "HelpSteer3": of_two(helpsteer3),
    "Intel's Orca pairs": of_pairs(orca),
    "argilla's Orca pairs": of_pairs(distilabel_orca),
    "argilla's Orca KTO": each("unpaired", "bco", orca_kto),
    "argilla's Capybara": of_pairs(capybara),
    "SHP": of_two(shp),
    "Chatbot Arena": of_two(arena),
    "PKU-SafeRLHF": of_two(safe_rlhf),
    "Tülu 3": of_pairs(tulu),
    "Nectar": each("rankings", "dpo", nectar),
    "SmolTalk 2": of_pairs(smoltalk),
    "Azure": of_pairs(azure),
    "ms-swift, KTO": each("unpaired", "bco", swift_kto),
    "ms-swift, rejected_response": of_pairs(swift_rejected),
    "ms-swift, rejected_messages": of_pairs(swift_conversations),
    "LLaMA-Factory, ShareGPT": of_pairs(llamafactory),
    "LLaMA-Factory, KTO": each("unpaired", "bco", llamafactory_kto),
    "LLaMA-Factory, Alpaca": of_pairs(llamafactory_alpaca),
    "axolotl, chat_template": of_pairs(axolotl),
    "axolotl, prompt_pairs": of_pairs(axolotl_prompt_pairs),
    "Stack Exchange": of_pairs(stack_exchange),
    "OpenAI's summaries": of_two(summaries),
    "WebGPT": of_two(webgpt),
    "NeMo RL": each("rankings", "dpo", nemo),
    "Vertex AI": each("ratings", "lipo", vertex),
    "columns of their own": each(
        "pairs",
        "dpo",
        of_names_of_their_own,
        {"columns": {"prompt": "frage", "chosen": "besser", "rejected": "schlechter"}},
    ),
}
