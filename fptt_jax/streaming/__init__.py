"""Learning from one never-ending stream, a step at a time."""
