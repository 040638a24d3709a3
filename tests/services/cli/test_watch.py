from services.cli.watch import metrics_line


def test_metrics_line_shows_what_is_there():
    dpo = {"step": 3, "train_loss": 0.51294, "train_reward_margin": 0.4821, "train_reward_accuracy": 0.9688}
    assert metrics_line(dpo) == "loss 0.5129  margin 0.482  accuracy 97%"
    assert metrics_line({"step": 3, "train_loss": 2.0, "train_reward_margin": None}) == "loss 2.0000"
