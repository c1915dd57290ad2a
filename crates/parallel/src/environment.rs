//! What the environment says about how this process was started.

use crate::{Error, Result};

/// How this process was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Started {
    /// By itself: MPI is not needed.
    Alone,
    /// With others, whose number is given where the launcher says it.
    Together { tasks: Option<usize> },
}

/// The number of ranks, as mpirun of Open MPI, of MPICH and its kin (also Slurm's pmi2 and Cray's
/// PALS), and of MVAPICH say it.
const SIZES: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"];

/// Set where a launcher offers PMIx.
const PMIX: [&str; 2] = ["PMIX_RANK", "PMIX_NAMESPACE"];

/// Set in processes that srun starts, unlike `SLURM_NTASKS`, which a batch script sees too.
const SRUN: &str = "SLURM_STEP_NUM_TASKS";

pub(crate) fn started(variable: impl Fn(&str) -> Option<String>) -> Result<Started> {
    let tasks_of = |tasks| match tasks {
        1 => Started::Alone,
        _ => Started::Together { tasks: Some(tasks) },
    };
    for name in SIZES {
        if let Some(tasks) = number(name, &variable)? {
            return Ok(tasks_of(tasks));
        }
    }
    let pmix = PMIX.iter().any(|name| variable(name).is_some());
    match number(SRUN, &variable)? {
        // MPI would set up a world of one in each task.
        Some(expected) if expected > 1 && !pmix => Err(Error::Singleton { expected, got: 1 }),
        Some(tasks) => Ok(tasks_of(tasks)),
        None if pmix => Ok(Started::Together { tasks: None }),
        None => Ok(Started::Alone),
    }
}

/// A variable that holds a whole number above 0, where it is set.
pub(crate) fn number(
    name: &'static str,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<usize>> {
    let Some(value) = variable(name) else { return Ok(None) };
    match value.trim().parse() {
        Ok(number) if number > 0 => Ok(Some(number)),
        _ => Err(Error::Environment { name, value }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> Result<Started> {
        started(|name| {
            let found = variables.iter().find(|(other, _)| *other == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[track_caller]
    fn together(variables: &[(&str, &str)], tasks: Option<usize>) {
        assert_eq!(with(variables).unwrap(), Started::Together { tasks });
    }

    #[test]
    fn a_process_by_itself_needs_no_mpi() {
        assert_eq!(with(&[]).unwrap(), Started::Alone);
        assert_eq!(with(&[("OMPI_COMM_WORLD_SIZE", "1")]).unwrap(), Started::Alone);
        assert_eq!(with(&[(SRUN, "1"), ("PMIX_RANK", "0")]).unwrap(), Started::Alone);
        // A batch script that starts the program without srun.
        assert_eq!(with(&[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0")]).unwrap(), Started::Alone);
    }

    #[test]
    fn launchers_are_known_by_their_variables() {
        together(&[("OMPI_COMM_WORLD_SIZE", "3")], Some(3));
        together(&[("PMI_SIZE", "2")], Some(2));
        together(&[(SRUN, "4"), ("PMIX_NAMESPACE", "slurm.pmix.1.0")], Some(4));
        together(&[("PMIX_RANK", "0")], None);
        // mpirun within an srun step of one task a node.
        together(&[(SRUN, "2"), ("OMPI_COMM_WORLD_SIZE", "8")], Some(8));
    }

    #[test]
    fn singletons_under_srun_are_refused_with_the_cure() {
        let message = with(&[(SRUN, "2"), ("SLURM_PROCID", "1")]).unwrap_err().to_string();
        assert!(message.contains("2 tasks") && message.contains("--mpi=pmix"), "{message}");
    }

    #[test]
    fn a_variable_that_is_no_number_is_named() {
        for value in ["two", "0", "-1", ""] {
            let message = with(&[("PMI_SIZE", value)]).unwrap_err().to_string();
            assert!(message.contains("PMI_SIZE") && message.contains(value), "{message}");
        }
    }
}
