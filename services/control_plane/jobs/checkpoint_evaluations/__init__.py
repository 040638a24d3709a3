"""The evaluations that a job asks for: of its checkpoints while it trains, and of its policy when it has succeeded."""
