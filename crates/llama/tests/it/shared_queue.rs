//! Groups that take their rows from one queue, which rank 0 answers for while it generates.

use std::{
    cell::{Cell, RefCell},
    ops::ControlFlow,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use dromedary_llama::generation::EngineConfig;
use dromedary_parallel::{Communicator, ParallelDims, SingleProcess, WorkQueue};

use crate::support::{Loaded, on_ranks, request, stories};

/// Against hanging: answers come within milliseconds.
const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn every_step_looks_after_the_other_ranks() {
    let loaded = Loaded::new(&stories(), &SingleProcess);
    let calls = Cell::new(0);
    let mut engine =
        loaded.engine(&SingleProcess, EngineConfig { max_gen_len: 20, ..EngineConfig::default() });
    engine.on_step(|| {
        calls.set(calls.get() + 1);
        Ok(())
    });
    let mut requests = [request("a", vec![1, 403])].into_iter();
    let statistics =
        engine.run(&mut || requests.next(), &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(statistics.decode_steps > 10);
    // Each token, the prompt, and the step that finds nothing left.
    assert_eq!(calls.get(), statistics.decode_steps + 2);
}

/// Rank 0 never leaves its engine before the other group has all of its rows: that group would wait
/// for ever if the engine's steps did not answer it.
#[test]
fn a_rank_0_that_generates_answers_the_other_groups() {
    const ROWS: usize = 60;
    let served = AtomicBool::new(false);
    let taken = on_ranks(2, |world| {
        let group = ParallelDims::new(2, 1).unwrap().tp_group(world).unwrap();
        let queue = RefCell::new(WorkQueue::new(world, group.as_ref(), ROWS).unwrap());
        let mut taken = Vec::new();
        if world.rank() == 1 {
            loop {
                let rows = queue.borrow_mut().take(4).unwrap();
                if rows.is_empty() {
                    break;
                }
                taken.extend(rows);
            }
            served.store(true, Ordering::Release);
        } else {
            generate_until(&served, world, &queue, &mut taken);
        }
        queue.into_inner().finish().unwrap();
        taken
    });
    let mut all = taken.concat();
    all.sort_unstable();
    assert_eq!(all, (0..ROWS).collect::<Vec<_>>());
    assert!(taken[1].len() > taken[0].len(), "{taken:?}");
}

fn generate_until(
    served: &AtomicBool,
    world: &dyn Communicator,
    queue: &RefCell<WorkQueue<'_>>,
    taken: &mut Vec<usize>,
) {
    // `take` answers too: rank 0 takes once, before anybody else can have asked twice.
    taken.extend(queue.borrow_mut().take(2).unwrap());
    let loaded = Loaded::new(&stories(), &SingleProcess);
    let mut engine =
        loaded.engine(&SingleProcess, EngineConfig { max_gen_len: 8, ..EngineConfig::default() });
    engine.on_step(|| Ok(queue.borrow_mut().poll()?));
    let begun = Instant::now();
    let mut source = || {
        let go_on = !served.load(Ordering::Acquire) && begun.elapsed() < DEADLINE;
        go_on.then(|| request("again", vec![1, 403]))
    };
    engine.run(&mut source, &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(served.load(Ordering::Acquire), "rank {} answered nobody", world.rank());
}
