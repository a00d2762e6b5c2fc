"""Published numbers, each reproduced by one command: claims, runs, verdicts."""
