"""What comes after pre-training: tuning on conversations, and how well questions are answered."""
