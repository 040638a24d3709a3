"""Will a run fit? Answered before it runs, without torch."""
