use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use signal_hook::consts::signal::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use signal_hook::low_level::{emulate_default_handler, signal_name};

use crate::{Error, Result};

/// Signals that ask for a stop.
const SIGNALS: [i32; 3] = [SIGTERM, SIGINT, SIGUSR1];

/// A flag that SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 set: the loop of a stage asks for it, saves
/// and returns [`Error::Stopped`].
///
/// Clones share the flag. A second SIGINT ends the process at once, unless a
/// [`CriticalSection`] is open; second SIGTERM and SIGUSR1 change nothing, since batch systems
/// send several.
///
/// ```
/// # use dromedary_command::StopFlag;
/// let stop = StopFlag::default();
/// for row in 0..3 {
///     if stop.is_set() {
///         break;
///     }
///     let saving = stop.critical();
///     // write row ...
///     drop(saving);
/// }
/// ```
#[derive(Clone, Debug, Default)]
pub struct StopFlag {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Set by the handler itself, so that a loop that asks behind a signal sees it at once.
    stop: Arc<AtomicBool>,
    /// Whether the thread that watches signals has answered one.
    answered: AtomicBool,
    critical_sections: AtomicUsize,
}

/// What a signal does.
#[derive(Debug, PartialEq, Eq)]
enum Reaction {
    Stop,
    Ignore,
    Defer,
    EndNow,
}

impl StopFlag {
    /// A flag that the process's signals set; call it once, early in `main`.
    ///
    /// ([`StopFlag::default`] makes one that only [`set`](StopFlag::set) sets, for tests and for
    /// programs with handlers of their own.)
    ///
    /// # Errors
    /// [`Error::Signals`] where the handlers cannot be installed.
    pub fn install() -> Result<StopFlag> {
        let signals_error = |source| Error::Signals { source };
        let stop = StopFlag::default();
        for signal in SIGNALS {
            flag::register(signal, Arc::clone(&stop.shared.stop)).map_err(signals_error)?;
        }
        let mut signals = Signals::new(SIGNALS).map_err(signals_error)?;
        let watched = stop.clone();
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || signals.forever().for_each(|signal| watched.receive(signal)))
            .map_err(signals_error)?;
        Ok(stop)
    }

    /// Whether a stop was asked for.
    pub fn is_set(&self) -> bool {
        self.shared.stop.load(Ordering::SeqCst)
    }

    /// Asks for a stop.
    pub fn set(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
    }

    /// Opens a section, such as a save, that a second Ctrl-C does not cut short.
    pub fn critical(&self) -> CriticalSection {
        self.shared.critical_sections.fetch_add(1, Ordering::SeqCst);
        CriticalSection { shared: Arc::clone(&self.shared) }
    }

    /// [`Error::Stopped`] with `message`, where a stop was asked for.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn check(&self, message: impl FnOnce() -> String) -> Result<()> {
        if self.is_set() { Err(Error::stopped(message())) } else { Ok(()) }
    }

    fn receive(&self, signal: i32) {
        let name = signal_name(signal).unwrap_or("a signal");
        match self.reaction(signal) {
            Reaction::Stop if signal == SIGINT => {
                tracing::warn!("{name}: stopping at the next safe point; again to end at once");
            }
            Reaction::Stop => tracing::warn!("{name}: stopping at the next safe point"),
            Reaction::Ignore => {}
            Reaction::Defer => tracing::warn!("{name}: a save is under way, it ends first"),
            Reaction::EndNow => {
                tracing::warn!("{name} again: ending without saving");
                // Ends by the signal itself, so that a shell's loop around us stops as well; no
                // destructors run, a hanging one may be why the user is impatient.
                if emulate_default_handler(signal).is_err() {
                    std::process::abort();
                }
            }
        }
    }

    fn reaction(&self, signal: i32) -> Reaction {
        if !self.shared.answered.swap(true, Ordering::SeqCst) {
            Reaction::Stop
        } else if signal != SIGINT {
            Reaction::Ignore
        } else if self.shared.critical_sections.load(Ordering::SeqCst) > 0 {
            Reaction::Defer
        } else {
            Reaction::EndNow
        }
    }
}

/// While it lives, a second Ctrl-C does not end the process.
#[derive(Debug)]
#[must_use = "the section ends when this is dropped"]
pub struct CriticalSection {
    shared: Arc<Shared>,
}

impl Drop for CriticalSection {
    fn drop(&mut self) {
        self.shared.critical_sections.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use signal_hook::low_level::raise;

    use super::*;

    #[test]
    fn the_second_ctrl_c_ends_the_process_outside_critical_sections() {
        let flag = StopFlag::default();
        assert_eq!(flag.reaction(SIGINT), Reaction::Stop);
        let outer = flag.critical();
        let inner = flag.clone().critical();
        drop(inner);
        assert_eq!(flag.reaction(SIGINT), Reaction::Defer);
        drop(outer);
        assert_eq!(flag.reaction(SIGINT), Reaction::EndNow);
    }

    #[test]
    fn repeated_signals_of_a_batch_system_do_nothing() {
        let flag = StopFlag::default();
        assert_eq!(flag.reaction(SIGUSR1), Reaction::Stop);
        assert_eq!(flag.reaction(SIGTERM), Reaction::Ignore);
        assert_eq!(flag.reaction(SIGUSR1), Reaction::Ignore);
    }

    /// No thread has to run between the signal and the loop that asks.
    #[test]
    fn a_signal_sets_the_flag_before_it_returns() {
        let flag = StopFlag::install().unwrap();
        assert!(!flag.is_set());
        raise(SIGUSR1).unwrap();
        assert!(flag.is_set());
    }

    #[test]
    fn check_says_what_is_done() {
        let flag = StopFlag::default();
        assert!(flag.check(|| "3 rows".to_owned()).is_ok());
        flag.set();
        let error = flag.check(|| "3 rows".to_owned()).unwrap_err();
        assert_eq!(error.to_string(), "stopped: 3 rows");
    }
}
