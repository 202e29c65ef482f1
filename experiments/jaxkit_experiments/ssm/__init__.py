"""State-space models: reconstruction, sequence tasks, the delay task, kernel speed."""
