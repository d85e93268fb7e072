"""What a trained model learned: assignments, interventions, probes, statistics over seeds."""
