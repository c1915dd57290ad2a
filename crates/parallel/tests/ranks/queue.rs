//! Groups that share a queue with a rank 0 that is slow and looks up once a step.

use std::thread;
use std::time::{Duration, Instant};

use dromedary_parallel::{Communicator, Error, ParallelDims, WorkQueue};
use tch::Tensor;

use crate::say;

/// How one of the programs works.
struct Work {
    tp: usize,
    rows: usize,
    /// Time that rank 0 computes in one step, without looking up.
    slow_step: Duration,
    /// Time that the others take for a row.
    row: Duration,
    /// Steps of rank 0 between two calls of `poll`.
    poll_every: usize,
}

impl Work {
    fn of(word: &str) -> Self {
        let milliseconds = Duration::from_millis;
        let plain = Self {
            tp: 1,
            rows: 80,
            slow_step: milliseconds(250),
            row: milliseconds(10),
            poll_every: 1,
        };
        match word {
            "queue" => plain,
            "queue-pairs" => Self { tp: 2, ..plain },
            "queue-deaf" => Self { rows: 24, poll_every: 6, ..plain },
            "queue-ahead" => Self { rows: 30, row: milliseconds(300), ..plain },
            other => panic!("unknown word {other}"),
        }
    }
}

/// What a rank has measured.
#[derive(Default)]
struct Measured {
    rows: Vec<i64>,
    /// Longest step of rank 0.
    step: Duration,
    /// Longest wait for rows.
    longest: Duration,
    /// Time of all waits behind the first one.
    total: Duration,
}

pub(crate) fn work(word: &str, world: &dyn Communicator) -> Result<(), Error> {
    let work = Work::of(word);
    let group = ParallelDims::new(world.world_size(), work.tp)?.tp_group(world)?;
    world.barrier()?;
    let mut queue = WorkQueue::new(world, group.as_ref(), work.rows)?;
    // Rank 0's group alone is slow.
    let measured = if world.rank() < work.tp {
        slow(&work, group.as_ref(), &mut queue)?
    } else {
        quick(&work, &mut queue)?
    };
    queue.finish()?;
    report(&work, world, &measured)
}

/// Steps as of decoding: one row in a few steps, no MPI but that of the group within.
fn slow(
    work: &Work,
    group: &dyn Communicator,
    queue: &mut WorkQueue<'_>,
) -> Result<Measured, Error> {
    let mut measured = Measured::default();
    for step in 0.. {
        let begin = Instant::now();
        thread::sleep(work.slow_step);
        group.barrier()?;
        measured.step = measured.step.max(begin.elapsed());
        // `take` answers, too: between two polls it is left alone.
        if step % work.poll_every != 0 {
            continue;
        }
        queue.poll()?;
        if step % (4 * work.poll_every) == 0 {
            let rows = queue.take(1)?;
            if rows.is_empty() {
                break;
            }
            measured.rows.extend(rows.map(|row| row as i64));
        }
    }
    Ok(measured)
}

fn quick(work: &Work, queue: &mut WorkQueue<'_>) -> Result<Measured, Error> {
    let mut measured = Measured::default();
    loop {
        let begin = Instant::now();
        let rows = queue.take(4)?;
        let waited = begin.elapsed();
        measured.longest = measured.longest.max(waited);
        if !measured.rows.is_empty() {
            measured.total += waited;
        }
        if rows.is_empty() {
            return Ok(measured);
        }
        for row in rows {
            thread::sleep(work.row);
            queue.poll()?;
            measured.rows.push(row as i64);
        }
    }
}

/// Each row exactly once, and rank 0 says what was measured.
fn report(work: &Work, world: &dyn Communicator, measured: &Measured) -> Result<(), Error> {
    let all = world.all_gather(&Tensor::from_slice(&measured.rows))?;
    let mut counts = vec![0; work.rows];
    for row in Vec::<i64>::try_from(all).unwrap() {
        counts[row as usize] += 1;
    }
    assert_eq!(counts, vec![work.tp; work.rows]);
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let mut worst =
        Tensor::from_slice(&[measured.step, measured.longest, measured.total].map(milliseconds));
    world.all_reduce_max(&mut worst)?;
    let worst = Vec::<f64>::try_from(worst).unwrap();
    let [step, longest, total] = [worst[0], worst[1], worst[2]];
    if world.rank() == 0 {
        say(&format!("rank 0: step {step:.1} longest {longest:.1} total {total:.1} ms"));
    }
    Ok(())
}
