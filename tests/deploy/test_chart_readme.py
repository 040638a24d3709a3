import subprocess
import sys
from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_the_readme_of_the_chart_is_the_one_its_values_give() -> None:
    made = subprocess.run([sys.executable, DEPLOY / "chart_readme.py"], capture_output=True, text=True, check=True)
    assert (DEPLOY / "chart" / "README.md").read_text() == made.stdout
