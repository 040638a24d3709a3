import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.ray
def test_ranks_get_exactly_the_groups_of_the_file_whatever_their_number_where_they_begin_and_who_dies(
    ray_environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.services.training.reading_ranks", str(tmp_path)]
    subprocess.run(command, env=ray_environment, check=True, timeout=900)
