"""Reads rows as lines of JSON, has them scored by an application of the cluster, and writes the scores as lines of
JSON."""

import json
import sys
import time

import ray
from ray import serve
from ray.serve.exceptions import RequestCancelledError

from services.contract import Adapter, CannotAttach

ray.init(logging_level="ERROR", log_to_driver=False)
handle = serve.get_app_handle(sys.argv[1])

for line in sys.stdin:
    request = json.loads(line)
    adapter = Adapter(**request["adapter"]) if "adapter" in request else None
    answer = handle.score.remote(request["prompt_ids"], request["completion_ids"], request.get("others", ()), adapter)
    if "cancel_after" in request:
        time.sleep(request["cancel_after"])
        answer.cancel()
    try:
        said = {"scores": answer.result()}
    except RequestCancelledError:
        said = {"scores": None}
    except CannotAttach as error:
        said = {"error": f"CannotAttach: {error.cause}"}
    except ValueError as error:
        said = {"error": str(error).rpartition("ValueError: ")[2]}
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
