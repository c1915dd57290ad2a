//! What a demo remembers of itself, so that an interrupted one goes on.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::terminal::say;

const FILE: &str = "demo.json";
pub(super) const REPORT: &str = "report.md";

/// What a demo was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Settings {
    /// Prompts that are aligned.
    pub(super) prompts: usize,
    /// The folder of the sources; none for those of the checkout.
    pub(super) data: Option<PathBuf>,
}

/// `demo.json`: the settings, and how long each finished step took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) settings: Settings,
    pub(super) seconds: Vec<(String, f64)>,
}

impl State {
    /// Goes on with the demo in `folder` if it was asked for the same and did not end; else begins
    /// anew in an empty folder.
    pub(super) fn open(folder: &Path, settings: Settings) -> Result<Self> {
        let old = fs::read(folder.join(FILE))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Self>(&bytes).ok());
        if let Some(old) = old
            && old.settings == settings
            && !folder.join(REPORT).exists()
        {
            say!("going on with the demo in {}", folder.display());
            return Ok(old);
        }
        if folder.exists() {
            say!("$ rm -r {}", folder.display());
            fs::remove_dir_all(folder)
                .with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let state = Self { settings, seconds: Vec::new() };
        state.save(folder)?;
        Ok(state)
    }

    /// Whether the step is done.
    pub(super) fn has(&self, step: &str) -> bool {
        self.seconds.iter().any(|(name, _)| name == step)
    }

    /// Notes that the step is done.
    pub(super) fn add(&mut self, folder: &Path, step: &str, seconds: f64) -> Result<()> {
        self.seconds.push((step.to_owned(), seconds));
        self.save(folder)
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        let unfinished = folder.join("demo.json.tmp");
        fs::write(&unfinished, serde_json::to_vec_pretty(self)?)
            .and_then(|()| fs::rename(&unfinished, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_demo_goes_on_and_others_begin_anew() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("runs/demo");
        let quick = Settings { prompts: 16, data: None };
        let mut state = State::open(&folder, quick.clone()).unwrap();
        state.add(&folder, "clean", 1.5).unwrap();
        let again = State::open(&folder, quick.clone()).unwrap();
        assert_eq!(again, state);
        assert!(again.has("clean") && !again.has("train"));

        fs::write(folder.join("prompts.json"), "[]").unwrap();
        let other = State::open(&folder, Settings { prompts: 64, data: None }).unwrap();
        assert!(!other.has("clean") && !folder.join("prompts.json").exists());

        fs::write(folder.join(REPORT), "").unwrap();
        State::open(&folder, Settings { prompts: 64, data: None }).unwrap();
        assert!(!folder.join(REPORT).exists(), "a finished demo begins anew");

        fs::write(folder.join(FILE), "torn {").unwrap();
        assert_eq!(State::open(&folder, quick).unwrap().seconds, []);
    }
}
