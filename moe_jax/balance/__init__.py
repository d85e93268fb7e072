"""Balance of routing: statistics, losses, what is logged."""
