use std::path::{Path, PathBuf};

use dromedary_command::{Error, Result};

/// A row in a thousand may be bad.
pub(crate) const MAX_BAD_ROWS: f64 = 0.001;

/// A share between 0 and 1.
pub(crate) fn share(value: Option<f64>, default: f64, flag: &str) -> Result<f64> {
    let share = value.unwrap_or(default);
    if (0.0..=1.0).contains(&share) {
        Ok(share)
    } else {
        Err(Error::usage(format!("{flag} {share}: expected a share from 0 to 1")))
    }
}

/// A number that is at least 1.
pub(crate) fn positive(value: usize, flag: &str) -> Result<usize> {
    if value > 0 {
        Ok(value)
    } else {
        Err(Error::usage(format!("{flag} 0: nothing would be left")))
    }
}

/// Refuses to write over what is read.
pub(crate) fn refuse_overwriting<'p>(
    output: &Path,
    inputs: impl IntoIterator<Item = &'p PathBuf>,
) -> Result<()> {
    let Ok(target) = output.canonicalize() else {
        return Ok(());
    };
    for input in inputs {
        if input.canonicalize().is_ok_and(|input| input == target) {
            return Err(Error::usage(format!(
                "the output {} would replace an input",
                output.display()
            )));
        }
    }
    Ok(())
}

/// Dromedary's rows cannot be promised where lengths are estimates.
pub(crate) fn require_tokenizer_for_compat(compat: bool, tokenizer: bool) -> Result<()> {
    if compat && !tokenizer {
        return Err(Error::usage(
            "--compat dromedary needs --tokenizer (the tokenizer.json of LLaMA): the original's \
             rows depend on exact lengths",
        ));
    }
    Ok(())
}
