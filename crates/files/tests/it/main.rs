//! The crate under faults, in processes of its own.

mod faults;
