"""Pages of the documentation site, and the scripts that write and build them."""
