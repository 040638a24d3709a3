import pytest

from demo.report import draw, read_curves


@pytest.mark.slow
def test_results_file_becomes_curves_and_a_picture(tmp_path):
    curves = read_curves("step,train_loss,train_reward_margin,train_reward_accuracy\n1,0.69,,0.5\n2,0.4,0.8,1.0\n")
    assert curves["train_loss"] == [0.69, 0.4]
    assert curves["train_reward_margin"] == [0.8]
    whole = read_curves("step,train_loss,train_reward_margin,train_reward_accuracy\n1,0.69,0,0.5\n2,0.4,0.8,1.0\n")
    draw(whole, whole, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
