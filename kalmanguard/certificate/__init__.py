"""What a run can state about itself, and how anyone can check it."""
