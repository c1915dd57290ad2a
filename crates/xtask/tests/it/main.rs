//! Tests of `cargo xtask` from outside.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod checks;
mod demo;
mod machine;
mod pages;
mod rust_version;
mod setup;
mod slurm_page;
