"""After pre-training: tuning, rewards and judges of steps, and how well questions are answered."""
