//! Last words of a rank.

use std::io::{self, Write as _};

/// One line in one write, so that ranks that share a terminal do not write into each other's
/// lines. It goes to stderr itself: a subscriber of traces may be absent, or be what fails.
pub(crate) fn say(line: &str) {
    // Nobody is left to be told.
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}
