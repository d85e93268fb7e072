"""Published checkpoints in and out, and the evaluation harness."""
