//! What forward keeps for backward: everything, the inputs of half-blocks, or as much as fits.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    plan::{MemoryPlan, PlanInput},
};

/// Share of the memory that is free now that `auto` plans for where none was given.
const FREE_SHARE: f64 = 0.9;

/// What forward keeps for backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ActivationsMode {
    /// All that backward needs: the fastest.
    Keep,
    /// The inputs of half-blocks, which are computed a second time.
    Recompute,
    /// All that backward needs of as many layers as fit into --max-memory.
    Auto,
}

impl ActivationsMode {
    /// The layers whose activations are kept, of a run as `input` describes it, in `max_memory` bytes; for
    /// `auto` without a number in most of what is free on this machine.
    ///
    /// # Errors
    /// [`Error::Setting`] where even recomputing takes more memory than was given.
    pub fn kept_layers(self, input: &PlanInput<'_>, max_memory: Option<u64>) -> Result<usize> {
        let memory = match self {
            Self::Keep => return Ok(input.config.num_hidden_layers as usize),
            Self::Recompute => return Ok(0),
            Self::Auto => max_memory.or_else(free_memory).unwrap_or(u64::MAX),
        };
        MemoryPlan::kept_layers_within(input, memory)?.ok_or_else(|| {
            let least = PlanInput { kept_layers: 0, ..input.clone() };
            let needed = MemoryPlan::new(&least).map_or(0, |plan| plan.total());
            Error::Setting {
                setting: "--max-memory",
                message: format!(
                    "{:.2} GB, but {:.2} GB are needed with all activations computed twice and {} tokens \
                     in a micro-batch",
                    memory as f64 / 1e9,
                    needed as f64 / 1e9,
                    input.tokens
                ),
            }
        })
    }
}

/// Most of the memory that the system could still give, in bytes.
fn free_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some((FREE_SHARE * (kilobytes << 10) as f64) as u64)
}

/// The most memory that this process has held, in bytes; where the system tells.
pub(crate) fn peak_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes << 10)
}
