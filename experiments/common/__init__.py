"""What commands and studies share."""
