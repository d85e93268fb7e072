"""Object storage: what is read from gs:// and s3://, and what is written there."""
