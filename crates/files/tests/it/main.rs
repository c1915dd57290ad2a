//! The crate under faults, in processes of its own.

#![allow(clippy::unwrap_used, reason = "clippy does not know helpers of tests for tests")]

/// Full disks, kills, second jobs.
mod faults;
