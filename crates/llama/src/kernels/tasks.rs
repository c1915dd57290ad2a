//! Work dealt out to libtorch's threads.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use dromedary_torch_ext::{num_threads, parallel_for};

use crate::Result;

/// Gives each of `tasks` to a thread that is free, in their order. A thread makes a context for
/// itself first.
pub(crate) fn run<T: Send, C>(
    tasks: Vec<T>,
    context: impl Fn() -> C + Sync,
    body: impl Fn(&mut C, T) + Sync,
) -> Result<()> {
    let workers = num_threads().min(tasks.len());
    if workers <= 1 {
        let mut context = context();
        tasks.into_iter().for_each(|task| body(&mut context, task));
        return Ok(());
    }
    let next = AtomicUsize::new(0);
    let tasks: Vec<Mutex<Option<T>>> =
        tasks.into_iter().map(|task| Mutex::new(Some(task))).collect();
    parallel_for(workers, |range| {
        for _ in range {
            let mut context = context();
            while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                let task = task.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(task) = task {
                    body(&mut context, task);
                }
            }
        }
    })?;
    Ok(())
}

/// Threads that tasks are dealt out to.
pub(crate) fn threads() -> usize {
    num_threads().max(1)
}

/// A piece for each thread: ranges that together make `0..count`, none of them empty.
pub(crate) fn shares(count: usize) -> Vec<std::ops::Range<usize>> {
    super::simd::even_parts(count, count.div_ceil(threads()).max(1)).collect()
}
