//! Processes that work as one: communicators, process grid, failing together
