//! What the environment gives tests: a model that is too large for the checkout, and time.

use std::path::PathBuf;

/// SmolLM2-135M-Instruct, which is too large for the checkout.
pub(crate) fn smollm2() -> Option<PathBuf> {
    let dir = std::env::var_os("DROMEDARY_SMOLLM2").map(PathBuf::from);
    if dir.is_none() {
        let required = std::env::var("DROMEDARY_REQUIRE_TEST_DATA").is_ok_and(|value| value == "1");
        assert!(!required, "DROMEDARY_SMOLLM2 must name the model's folder");
        eprintln!("skipped: DROMEDARY_SMOLLM2 does not name the model's folder");
    }
    dir
}

/// Whether tests may take minutes.
pub(crate) fn soak() -> bool {
    std::env::var("DROMEDARY_SOAK").is_ok_and(|value| value == "1")
}
