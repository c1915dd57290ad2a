//! Ranks as threads and as processes: what they promise, and how they end.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

#[path = "../contract/mod.rs"]
mod contract;
/// Jobs that fail, started as a user starts them.
mod failing;
/// Starts and watches jobs.
mod job;
/// Ranks whose tensors a stand-in for NCCL moves.
mod nccl;
/// This crate's own program in jobs.
mod program;
/// Groups that share a queue of rows, each as fast as it is.
mod queue;
/// One rank and several as threads.
mod threads;
/// Jobs that work.
mod working;
