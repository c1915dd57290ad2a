//! What forward keeps for backward: everything, the inputs of half-blocks, or as much as fits.

use std::{
    fs,
    path::{Path, PathBuf},
};

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
            Self::Auto => max_memory.or_else(|| available_memory(1)).unwrap_or(u64::MAX),
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

/// Memory of this process, one of `ranks` alike on this machine, in bytes: what it holds already, and most of
/// its share of what the system could still give; at most its share of what their control group may have.
pub(crate) fn available_memory(ranks: usize) -> Option<u64> {
    let memory = Memory {
        free: kilobytes_of("/proc/meminfo", "MemAvailable:")?,
        held: kilobytes_of("/proc/self/status", "VmRSS:").unwrap_or(0),
        group: group_limit(Path::new("/sys/fs/cgroup"), Path::new("/proc/self/cgroup")),
    };
    Some(memory.of_one(ranks))
}

/// What the system tells of memory, in bytes.
struct Memory {
    /// Nobody holds it.
    free: u64,
    /// This process does.
    held: u64,
    /// The most that the processes of the control group may hold together.
    group: Option<u64>,
}

impl Memory {
    fn of_one(&self, ranks: usize) -> u64 {
        let share = |bytes: u64| (FREE_SHARE * bytes as f64 / ranks.max(1) as f64) as u64;
        let of_machine = self.held + share(self.free);
        self.group.map_or(of_machine, |limit| of_machine.min(share(limit)))
    }
}

/// The lowest limit of this process's control group and of those around it.
fn group_limit(root: &Path, membership: &Path) -> Option<u64> {
    let text = fs::read_to_string(membership).ok()?;
    let limit = |folder: PathBuf, file: &str| {
        let groups = folder.ancestors().take_while(|group| group.starts_with(root));
        // `max` is no number, and no limit.
        groups
            .filter_map(|group| {
                fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok()
            })
            .min()
    };
    let of_line = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
        match controllers {
            "" => limit(root.join(path), "memory.max"),
            "memory" => limit(root.join("memory").join(path), "memory.limit_in_bytes"),
            _ => None,
        }
    };
    text.lines().filter_map(of_line).min()
}

/// The most memory that this process has held, in bytes; where the system tells.
pub(crate) fn peak_memory() -> Option<u64> {
    kilobytes_of("/proc/self/status", "VmHWM:")
}

/// A line `name: 123 kB` of a file of the kernel, in bytes.
fn kilobytes_of(file: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_machine_share_its_memory_and_keep_what_they_hold() {
        let memory = |group| Memory { free: 1000, held: 50, group };
        assert_eq!(memory(None).of_one(1), 950);
        assert_eq!(memory(None).of_one(4), 275);
        assert_eq!(memory(Some(5000)).of_one(4), 275);
        assert_eq!(memory(Some(400)).of_one(4), 90);
    }

    #[test]
    fn the_lowest_limit_around_a_process_counts() {
        let dir = tempfile::tempdir().unwrap();
        let [root, membership] = ["groups", "membership"].map(|name| dir.path().join(name));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("job_7/step_0/memory.max", "max\n");
        write("job_7/memory.max", "3000\n");
        write("memory/old/job/memory.limit_in_bytes", "2000\n");
        let limit = |text: &str| {
            fs::write(&membership, text).unwrap();
            group_limit(&root, &membership)
        };
        assert_eq!(limit("0::/job_7/step_0\n"), Some(3000));
        assert_eq!(limit("0::/\n"), None);
        assert_eq!(limit("5:cpu:/x\n4:memory:/old/job\n0::/\n"), Some(2000));
        assert_eq!(group_limit(&root, &dir.path().join("none")), None);
    }

    #[test]
    fn this_machine_tells() {
        let alone = available_memory(1).unwrap();
        assert!(available_memory(4).unwrap() < alone && peak_memory().unwrap() > 1 << 20);
    }
}
