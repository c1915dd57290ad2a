//! The example program, run as a user runs it.

#![allow(clippy::unwrap_used, reason = "clippy does not know helpers of tests for tests")]

/// Exit codes, flags and signals.
mod program;
