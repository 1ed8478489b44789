"""SAEs to and from other libraries."""
