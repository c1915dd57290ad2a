//! Files of rows as a user has them.

#![allow(clippy::unwrap_used, reason = "clippy does not know helpers of tests for tests")]

/// Damaged and hostile files, full disks.
mod faults;
/// What is written is read, whatever the format.
mod formats;
