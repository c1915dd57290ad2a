//! Integration tests: one module a part of the step, as a user of library or binary meets it.

#![allow(clippy::unwrap_used, reason = "clippy does not know helpers of tests for tests")]

/// The original's command lines and the settings files, through the binary.
mod commands;
/// `--compat dromedary` against golden rows.
mod compat;
/// The hand-made files that come with the project.
mod dummy_data;
/// Flags of generation that the engine takes.
mod engine_flags;
/// Jobs of several ranks that fail, started as a user starts them.
mod faults;
/// Every rule of the corrected filter: a row that it keeps, a row that it drops.
mod filter;
/// Outputs on a disk that is full.
mod full_disk;
/// Generation through the library: resume, rejected prompts, stops.
mod generate;
/// What the environment gives tests.
#[path = "../../../llama/tests/it/given.rs"]
#[allow(dead_code, reason = "the crate it belongs to uses all of it")]
mod given;
/// Somebody's own principles, from the edit to the training rows.
mod health_adviser;
/// Starts and watches jobs.
#[path = "../../../parallel/tests/it/job.rs"]
#[allow(dead_code, reason = "the crate it belongs to uses all of it")]
mod job;
/// Runs that are killed where they write, and what continues them.
mod kills;
/// From files of groups to training rows.
mod merge;
/// Rows whose logits are not finite.
mod not_finite;
/// What shows a run before, while and after it: `check`, `plan`, `status`, the page.
mod overview;
/// The prompt texts that come with the project.
mod prompts;
/// Rows, folders and a small model for the others.
mod support;
/// Verbose cloning: its prompt, its filter, its rows.
mod verbose;
/// Several groups of several ranks each in one world.
mod worlds;
