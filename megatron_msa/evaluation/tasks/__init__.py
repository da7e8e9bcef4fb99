"""What is asked: each task builds samples of any length."""
