use std::thread;
use std::time::Duration;

use dromedary_parallel::{
    Communicator, Error, Guarded, SingleProcess, ThreadCommunicator, threads,
};
use tch::{Device, Kind, Tensor};

use crate::contract;

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

type Call = fn(&ThreadCommunicator) -> Result<(), Error>;

/// `body` on each of `n` ranks; their results in rank order.
fn on_threads<T: Send + 'static>(
    n: usize,
    body: impl Fn(ThreadCommunicator) -> T + Clone + Send + 'static,
) -> Vec<T> {
    let ranks = threads(n).into_iter().map(|rank| {
        let body = body.clone();
        thread::spawn(move || body(rank))
    });
    ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect()
}

#[test]
fn one_process_keeps_the_contract() {
    contract::check(&SingleProcess);
}

#[test]
fn threads_keep_the_contract() {
    for n in [1, 2, 3] {
        on_threads(n, |rank| contract::check(&rank));
    }
}

#[test]
fn guarded_threads_keep_the_contract() {
    on_threads(2, |rank| {
        contract::check(&Guarded::new(Box::new(rank), Duration::from_secs(600)).unwrap());
    });
}

#[test]
fn other_shapes_kinds_roots_or_collectives_are_errors_on_every_rank() {
    let calls: [Call; 4] = [
        |rank| rank.all_reduce_sum(&mut Tensor::ones([2 + rank.rank() as i64], FLOAT)),
        |rank| {
            let kind = if rank.rank() == 0 { Kind::Float } else { Kind::Half };
            rank.all_reduce_max(&mut Tensor::ones([2], (kind, Device::Cpu)))
        },
        |rank| rank.broadcast(&mut Tensor::ones([2], FLOAT), rank.rank().min(1)),
        |rank| match rank.rank() {
            0 => rank.barrier(),
            _ => rank.all_reduce_sum(&mut Tensor::ones([2], FLOAT)),
        },
    ];
    for call in calls {
        for error in on_threads(3, move |rank| call(&rank).unwrap_err()) {
            assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        }
    }
    let shapes = on_threads(2, move |rank| calls[0](&rank).unwrap_err().to_string());
    let want = "rank 1 is in all_reduce_sum Float [3] while rank 0 is in all_reduce_sum Float [2]";
    assert_eq!(shapes[0], want);
}

#[test]
fn a_rank_that_leaves_is_named_to_those_who_wait() {
    let errors = on_threads(3, |rank| match rank.rank() {
        1 => None,
        _ => Some(rank.barrier().unwrap_err().to_string()),
    });
    let gone = Some("barrier: rank 1 has left".to_owned());
    assert_eq!(errors, [gone.clone(), None, gone]);
}

#[test]
fn a_rank_that_panics_is_gone_from_all_its_groups() {
    let ranks = threads(2).into_iter().map(|rank| {
        thread::spawn(move || {
            let group = rank.split(0, 0).unwrap();
            assert!(rank.rank() == 0, "rank 1 falls");
            group.barrier()
        })
    });
    let mut ends = ranks.collect::<Vec<_>>().into_iter().map(thread::JoinHandle::join);
    assert!(matches!(ends.next(), Some(Ok(Err(Error::RankGone { rank: 1, .. })))));
    assert!(matches!(ends.next(), Some(Err(_))));
}

#[test]
fn a_rank_may_leave_after_the_last_collective() {
    for _ in 0..200 {
        assert!(on_threads(3, |rank| rank.barrier()).iter().all(Result::is_ok));
    }
}

#[test]
fn an_abort_reaches_ranks_that_wait_in_other_groups() {
    let errors = on_threads(3, |rank| {
        let group = rank.split(usize::from(rank.rank() == 2), 0).unwrap();
        match rank.rank() {
            // Rank 1 never comes to this barrier.
            0 => group.barrier().unwrap_err().to_string(),
            1 => rank.barrier().unwrap_err().to_string(),
            _ => rank.abort(1, "disk full").to_string(),
        }
    });
    assert_eq!(errors[0], "the job was ended: rank 2: disk full");
    assert_eq!(errors[1], errors[0]);
    assert_eq!(errors[2], "the job was ended: disk full");
}
