"""Training: the task, the command-line verbs, and what a run leaves behind."""
