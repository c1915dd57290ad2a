//! Integration tests of step 3.

#![allow(clippy::unwrap_used, reason = "a test that meets an error is to fail")]

mod billion; // a model of a billion parameters on two ranks, for minutes
mod commands; // the program as a user runs it, interruptions included
mod counted; // ranks that count what they are asked for
mod divided; // what replicas divide: the same results in the memory that is planned
mod exchanged; // what ranks exchange in a step: buckets, and what the plan counts
mod faults; // runs that are killed, stopped, or find damaged checkpoints
mod formats; // data sets of other formats: tokens and masks of Hugging Face's libraries, errors, whole runs
/// What the environment gives tests.
#[path = "../../../llama/tests/it/given.rs"]
mod given;
mod goldens; // PEFT's gradients and losses
mod gradients; // half-blocks and head against one whole graph
mod inspect; // what a data set holds, before any step
mod interrupted; // jobs of several ranks: rows that are not finite, and what Slurm stops
mod job; // a run as a user starts it
/// Starts and watches jobs of several ranks.
#[path = "../../../parallel/tests/it/job.rs"]
#[allow(dead_code, reason = "the crate it belongs to uses all of it")]
mod launched;
mod layouts; // checkpoints of one layout of ranks, read at every other
mod memory; // what a run takes, planned and measured
mod modes; // adapters, dropout, all weights, activations, plans: by their flags
mod parallel; // data- and tensor-parallel runs against one rank, and how they fail
mod qlora; // frozen weights in four bits: bitsandbytes' gradients, memory, the program
mod results; // what a run leaves: metrics, curves, card, held-out losses, schedules
mod scaling; // time per step on paper, over numbers of nodes
mod steps; // whole optimizer steps: PEFT's losses, accumulation, numbers that are not finite
mod support; // a small real model and rows to train on
