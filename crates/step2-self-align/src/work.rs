//! What is left to do: prompts less the rows that any run has left in the folder.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use dromedary_files::{Lock, LockOptions};
use dromedary_parallel::{Communicator, ParallelDims, fault_point};
use dromedary_records::{FoundPrompt, Prompt, UNKNOWN_SOURCE, read_prompts};
use serde::{Deserialize, Serialize};

use crate::generate::GenerateConfig;
use crate::metrics::seconds_since_1970;
use crate::output::{Output, Settings};
use crate::run_file::{PromptCounts, RunFile};
use crate::shards::{RowHead, Shard, family, shard_path, whole_rows};
use crate::{Error, Result};

/// So much of a row that is no prompt goes into its record.
const MAX_EXCERPT: usize = 1000;

/// A prompt to be answered, or to be rejected at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Task {
    #[serde(flatten)]
    pub(crate) prompt: Prompt,
    /// Why the row of the input file is no prompt; its text is in the instruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) bad: Option<String>,
}

/// What is left to do, the same on all ranks; the first rank of each group has its group's output.
pub(crate) struct Work {
    /// Prompts of this job.
    pub(crate) prompts: usize,
    /// Those of them that have no row yet.
    pub(crate) left: Vec<Task>,
    pub(crate) output: Option<Output>,
}

/// What rank 0 tells the others.
#[derive(Serialize, Deserialize)]
struct Told {
    prompts: usize,
    left: Vec<Task>,
}

/// This rank's place in a job of several groups.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) world: &'a dyn Communicator,
    pub(crate) dims: ParallelDims,
}

impl Place<'_> {
    /// Number of this rank's group.
    pub(crate) fn group(&self) -> usize {
        self.dims.dp_rank(self.world.rank())
    }

    /// Whether this is the rank of its group that writes.
    pub(crate) fn leads(&self) -> bool {
        self.dims.tp_rank(self.world.rank()) == 0
    }
}

impl GenerateConfig {
    /// The file of a group of this job.
    pub(crate) fn shard(&self, place: &Place<'_>, group: usize) -> PathBuf {
        let groups = place.dims.dp;
        shard_path(&self.output_file, self.group_rank * groups + group, self.group_size * groups)
    }
}

impl Work {
    /// Each group opens its file; rank 0 reads the prompts and the rows of all files and tells the
    /// others, so that all of them do the same even where a file changes under their eyes.
    ///
    /// Every rank must call this.
    pub(crate) fn shared(
        config: &GenerateConfig,
        settings: &Settings,
        place: &Place<'_>,
    ) -> Result<Self> {
        let world = place.world;
        let input = if world.rank() == 0 { Some(Input::read(config)?) } else { None };
        let mut output = None;
        if place.leads() {
            let run = run_file(config, place, input.as_ref());
            let path = config.shard(place, place.group());
            output = Some(Output::open(path, settings, &run, config.break_lock)?);
        }
        if world.world_size() > 1 {
            // Every file of this job is locked and has a whole last row.
            world.barrier()?;
        }
        let mut told = None;
        if let (Some(input), Some(output)) = (input, &mut output) {
            let done = rows_of_all(config, settings, place, output)?;
            told = Some(input.less(&done));
        }
        let Told { prompts, left } = broadcast(told, world)?;
        fault_point("work-shared", 0)?;
        if let Some(output) = output.as_ref().filter(|_| !left.is_empty()) {
            output.reopen()?;
        }
        Ok(Self { prompts, left, output })
    }
}

fn run_file(config: &GenerateConfig, place: &Place<'_>, input: Option<&Input>) -> RunFile {
    RunFile {
        input_file: config.input_file.clone(),
        group_rank: config.group_rank,
        group_size: config.group_size,
        groups: place.dims.dp,
        tp: place.dims.tp,
        max_batch_size: config.max_batch_size,
        started_at: seconds_since_1970(),
        counts: input.map(|input| PromptCounts { input: input.rows, job: input.tasks.len() }),
    }
}

fn broadcast(told: Option<Told>, world: &dyn Communicator) -> Result<Told> {
    if world.world_size() > 1 {
        let mut message = match &told {
            Some(told) => serde_json::to_vec(told).map_err(Error::Exchange)?,
            None => Vec::new(),
        };
        world.broadcast_bytes(&mut message, 0)?;
        if told.is_none() {
            return serde_json::from_slice(&message).map_err(Error::Exchange);
        }
    }
    Ok(told.unwrap_or(Told { prompts: 0, left: Vec::new() }))
}

/// The prompts of this job.
struct Input {
    /// Rows of the file, as far as it is used.
    rows: usize,
    tasks: Vec<Task>,
}

impl Input {
    /// Prompts `R`, `R + G`, `R + 2G`, ... of the input.
    fn read(config: &GenerateConfig) -> Result<Self> {
        let path = &config.input_file;
        let mut input = Self { rows: 0, tasks: Vec::new() };
        let (mut bad, mut first) = (0, String::new());
        let found = read_prompts(path)?.with_bad_rows();
        for row in found.take(config.limit.unwrap_or(usize::MAX)) {
            let task = Task::of(row?);
            if let Some(reason) = &task.bad {
                bad += 1;
                if bad == 1 {
                    first = reason.clone();
                }
            }
            if input.rows % config.group_size == config.group_rank {
                input.tasks.push(task);
            }
            input.rows += 1;
        }
        let none = |message: String| Error::NoPrompts { path: path.clone(), message };
        let (rows, limit) = (input.rows, config.max_bad_rows);
        if rows == 0 {
            return Err(none("holds no prompt".to_owned()));
        }
        if bad as f64 > limit * rows as f64 {
            return Err(Error::BadRows { path: path.clone(), bad, rows, limit, first });
        }
        if input.tasks.is_empty() {
            let (rank, size) = (config.group_rank, config.group_size);
            return Err(none(format!("its {rows} prompts leave none for group {rank} of {size}")));
        }
        Ok(input)
    }

    /// What is left of it.
    fn less(self, done: &BTreeSet<String>) -> Told {
        let prompts = self.tasks.len();
        let left = self.tasks.into_iter().filter(|task| !done.contains(&task.prompt.id));
        Told { prompts, left: left.collect() }
    }
}

impl Task {
    fn of(found: FoundPrompt) -> Self {
        match found {
            FoundPrompt::Good(prompt) => Self { prompt, bad: None },
            FoundPrompt::Bad(bad) => {
                let prompt = Prompt {
                    id: bad.id,
                    source: UNKNOWN_SOURCE.to_owned(),
                    instruction: bad.text.chars().take(MAX_EXCERPT).collect(),
                    input: String::new(),
                };
                Self { prompt, bad: Some(format!("no prompt: {}", bad.error.bad_row())) }
            }
        }
    }
}

/// Every id that has a row in a file of this generation, whatever number of groups wrote it.
fn rows_of_all(
    config: &GenerateConfig,
    settings: &Settings,
    place: &Place<'_>,
    own: &mut Output,
) -> Result<BTreeSet<String>> {
    let mut done = own.take_done();
    let of_this_job: Vec<_> = (0..place.dims.dp).map(|group| config.shard(place, group)).collect();
    for path in family(own.path())? {
        if path.file_name() == own.path().file_name() {
            continue;
        }
        if !of_this_job.contains(&path) {
            refuse_other_groups(&path, config)?;
        }
        let before = done.len();
        for row in whole_rows::<RowHead>(&path)? {
            done.insert(row?.id);
        }
        if done.len() > before {
            settings.check(&path)?;
        }
    }
    Ok(done)
}

/// Groups of the same number answer different prompts and run side by side; those of another number
/// would answer some of ours.
fn refuse_other_groups(path: &Path, config: &GenerateConfig) -> Result<()> {
    let ours = config.group_size;
    let theirs = RunFile::read(path).map_or(Shard::of(path).size, |run| run.group_size);
    if theirs == ours || config.break_lock {
        return Ok(());
    }
    match Lock::live_holder(path, &LockOptions::from_env(false))? {
        Some(holder) => Err(Error::OtherGroups {
            path: path.to_owned(),
            holder: Box::new(holder),
            theirs,
            ours,
        }),
        None => Ok(()),
    }
}
