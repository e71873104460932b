"""What models are for: one file a task, which says all that the stages ask of it (`hfq.tasks.base`)."""
