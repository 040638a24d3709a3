"""Computes rewards of rows of token ids with vLLM, in its own process.

It reads JSON from standard input, and writes the result to a file, because vLLM logs to standard output.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # vLLM starts its workers from this file
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM
    from vllm.inputs import TokensPrompt

    model, answer = sys.argv[1:]
    engine = LLM(model, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=256)
    rows = [TokensPrompt(prompt_token_ids=ids) for ids in json.load(sys.stdin)]
    Path(answer).write_text(json.dumps([output.outputs.probs for output in engine.classify(rows, use_tqdm=False)]))
    engine.llm_engine.engine_core.shutdown()  # else a thread of vLLM's does it while Python ends, and may abort
