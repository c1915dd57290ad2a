//! Integration tests of step 1.

#![allow(clippy::unwrap_used, reason = "clippy does not know helpers of tests for tests")]

/// What the tests share: folders, files of rows, running the binary.
mod support;

/// The cleaning rules against goldens from Python, and their properties.
mod cleaning;

/// Filters, comparison and order, and their properties.
mod rules;

/// Every format of every source, and rows of the wrong shape.
mod sources;

/// The three commands as functions: counts, order, memory on disk, errors.
mod commands;

/// The binary: the original's command lines, configuration files, exit codes.
mod cli;

/// Our own sample data: every rule is met, both sets of rules.
mod dummy_data;

/// The rules that are off by default: near-duplicates, languages, benchmarks, samples, mixes.
mod optional;

/// The report, its page, and the way of one row.
mod report;

/// The example of the library, on a few rows.
mod example;

/// What the library must not need.
mod dependencies;

/// Forms of files, folders of them, and what is the same whatever the form or the threads.
mod formats;

/// Damaged files in a process with little memory.
mod faults;

/// Small parquet files that promise petabytes.
mod bombs;

/// What `--threads` limits.
mod threads;
