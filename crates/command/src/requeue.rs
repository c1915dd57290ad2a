use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Ends a run that a signal has stopped: alone by [`Error::Stopped`], exit code 75. A task of Slurm's
/// srun ends well, because the first one that does not makes `--kill-on-bad-exit` kill the others while
/// they save; there rank 0 writes `requeue-<job>.json` into `folder`, which the batch script looks for
/// before it calls `scontrol requeue`.
///
/// # Errors
/// [`Error::Stopped`] outside of srun; [`Error::Requeue`] where the file cannot be written.
pub fn stop_or_requeue(folder: &Path, rank: usize, message: String) -> Result<()> {
    let variable = |name: &str| std::env::var(name).ok();
    let Some(job) = variable("SLURM_JOB_ID").filter(|_| variable("SLURM_STEP_ID").is_some()) else {
        return Err(Error::stopped(message));
    };
    if rank == 0 {
        tracing::warn!("stopped: {message}");
        write(folder, &job)?;
    }
    Ok(())
}

fn write(folder: &Path, job: &str) -> Result<PathBuf> {
    // Slurm's numbers; whatever else stands there is no part of a path or of JSON.
    let job: String = job.chars().filter(char::is_ascii_alphanumeric).collect();
    let path = folder.join(format!("requeue-{job}.json"));
    let part = path.with_extension("part");
    fs::write(&part, format!("{{\"job_id\": \"{job}\"}}\n"))
        .and_then(|()| fs::rename(&part, &path))
        .map_err(|source| Error::Requeue { path: path.clone(), source })?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_names_its_job() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), "77\"/").unwrap();
        assert_eq!(path.file_name().unwrap(), "requeue-77.json");
        assert_eq!(fs::read_to_string(path).unwrap(), "{\"job_id\": \"77\"}\n");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let error = write(&folder.path().join("absent"), "77").unwrap_err().to_string();
        assert!(error.contains("requeue-77.json"), "{error}");
    }
}
