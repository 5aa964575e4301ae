"""A model in use on the loopback: one page to drop pictures on, and a JSON endpoint beside it."""
