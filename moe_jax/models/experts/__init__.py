"""Feed-forward experts: sorted tokens through grouped products."""
