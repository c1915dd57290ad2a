//! Files of rows as a user has them.

mod faults;
mod formats;
