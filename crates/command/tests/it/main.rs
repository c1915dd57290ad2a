//! The example program, run as a user runs it.

mod program;
