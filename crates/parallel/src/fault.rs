//! Faults on purpose, so that tests see how a job ends in the programs that users run.
//!
//! `DROMEDARY_FAULT=rank=1,point=layer3` lets rank 1 panic where it comes to layer 3 for the first
//! time; `,how=error`, `kill`, `stop` or `hang` behind it fail in other ways. Without the variable a
//! point is one look at a cell that is empty.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::process::{Signal, getpid, kill_process};

use crate::stderr::say;
use crate::{Error, Result};

/// The variable.
const VARIABLE: &str = "DROMEDARY_FAULT";

/// The fault of this rank, where it has one.
static FAULT: OnceLock<Fault> = OnceLock::new();

#[derive(Debug)]
struct Fault {
    point: String,
    how: How,
    done: AtomicBool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Panic,
    Error,
    /// As the kernel kills a process that takes too much memory.
    Kill,
    /// Stopped, as a machine that hangs.
    Stop,
    /// Waits for ever without telling anybody: what each of the others would be without our care.
    Hang,
}

/// Sets up the fault that the environment asks for, if this is the rank that is meant.
///
/// # Errors
/// [`Error::FaultSetting`].
pub(crate) fn arm(rank: usize, variable: impl Fn(&str) -> Option<String>) -> Result<()> {
    let Some(value) = variable(VARIABLE) else { return Ok(()) };
    let (of, fault) = parse(&value).ok_or(Error::FaultSetting { value })?;
    if of == rank {
        // A second launch in one process is refused by MPI, and alone it finds the same fault.
        let _ = FAULT.set(fault);
    }
    Ok(())
}

fn parse(value: &str) -> Option<(usize, Fault)> {
    let (mut rank, mut point, mut how) = (None, None, How::Panic);
    for part in value.split(',') {
        match part.trim().split_once('=')? {
            ("rank", number) => rank = Some(number.parse().ok()?),
            ("point", name) => point = Some(name.to_owned()),
            ("how", "panic") => how = How::Panic,
            ("how", "error") => how = How::Error,
            ("how", "kill") => how = How::Kill,
            ("how", "stop") => how = How::Stop,
            ("how", "hang") => how = How::Hang,
            _ => return None,
        }
    }
    Some((rank?, Fault { point: point?, how, done: AtomicBool::new(false) }))
}

/// A place where `DROMEDARY_FAULT` can make this rank fail, such as (`layer`, 3) by
/// `point=layer3`. It does nothing where the variable is not set.
///
/// # Errors
/// [`Error::Fault`] where an error is asked for.
///
/// # Panics
/// Where that is asked for.
pub fn fault_point(name: &str, number: usize) -> Result<()> {
    let Some(fault) = FAULT.get() else { return Ok(()) };
    let here = fault.point.strip_prefix(name).is_some_and(|rest| rest.parse() == Ok(number));
    if !here || fault.done.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    let point = fault.point.clone();
    // Whoever waits for it knows from when on.
    say(&format!("fault on purpose at {point}: {:?}", fault.how));
    match fault.how {
        How::Panic => panic!("fault on purpose at {point}"),
        How::Error => Err(Error::Fault { point }),
        How::Kill => signal(Signal::KILL),
        How::Stop => signal(Signal::STOP),
        How::Hang => loop {
            thread::park();
        },
    }
}

fn signal(signal: Signal) -> Result<()> {
    // A process may signal itself.
    let _ = kill_process(getpid(), signal);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_names_rank_point_and_manner() {
        let (rank, fault) = parse("rank=1,point=layer3").unwrap();
        assert_eq!((rank, fault.point.as_str(), fault.how), (1, "layer3", How::Panic));
        let (_, fault) = parse("rank=0, point=step20, how=stop").unwrap();
        assert_eq!((fault.point.as_str(), fault.how), ("step20", How::Stop));
    }

    #[test]
    fn a_fault_that_would_never_come_is_refused() {
        for value in ["", "rank=1", "point=layer3", "rank=x,point=layer3", "rank=1,point=a,how=no"]
        {
            let message = arm(0, |_| Some(value.to_owned())).unwrap_err().to_string();
            assert!(message.contains(&format!("`{value}`")), "{message}");
        }
    }

    #[test]
    fn without_the_variable_a_point_does_nothing() {
        arm(0, |_| None).unwrap();
        fault_point("layer", 3).unwrap();
    }
}
