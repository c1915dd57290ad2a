use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use dromedary_parallel::{Communicator, Error, Guarded, Launch, NcclLibraries, join_nccl};
use tch::{Device, Kind, Tensor};

use super::{contract, say};

/// How long a collective may take here.
const LIMIT: Duration = Duration::from_secs(2);

/// All ranks, joined by the library that the tests name, which takes host tensors for those of a GPU.
fn joined(world: &dyn Communicator) -> Result<Guarded, Error> {
    let library = PathBuf::from(std::env::var_os("NCCL_STAND_IN").expect("a library is named"));
    let libraries = NcclLibraries { nccl: library.clone(), driver: library };
    let group = join_nccl(world.split(0, world.rank())?, Device::Cpu, &libraries)?;
    let limit = if std::env::var_os("NCCL_STAND_IN_LATE").is_some() { LIMIT } else { LIMIT * 60 };
    Guarded::new(group, limit)
}

pub(crate) fn work(word: &str, launch: &Launch) -> Result<(), Error> {
    let group = joined(launch.world())?;
    let rank = group.rank();
    if word == "nccl-contract" {
        contract::check(&group);
        same_kinds(&group);
        say(&format!("rank {rank} kept the contract through NCCL"));
        return Ok(());
    }
    if word == "nccl-each" {
        return each_kind(&group);
    }
    if word == "nccl-ended" {
        used_behind_an_error(&group);
        drop(group);
        say(&format!("rank {rank} got an error each time"));
        return Ok(());
    }
    if word == "nccl-late" && rank == 1 {
        thread::sleep(Duration::from_secs(3600));
    }
    let mut tensor = Tensor::from(1.0_f32);
    group.all_reduce_sum(&mut tensor)
}

/// 16-bit kinds travel as they are where nothing is added up.
fn same_kinds(group: &dyn Communicator) {
    let (rank, last) = (group.rank() as f64, group.world_size() as f64 - 1.0);
    for kind in [Kind::Half, Kind::BFloat16, Kind::Float] {
        let own = || Tensor::from_slice(&[rank - 1.0, -rank, 0.5 * rank]).to_kind(kind);
        let mut most = own();
        group.all_reduce_max(&mut most).unwrap();
        assert_eq!(most, Tensor::from_slice(&[last - 1.0, 0.0, 0.5 * last]).to_kind(kind));
        let all = group.all_gather(&own()).unwrap();
        assert_eq!((all.kind(), all.size()), (kind, vec![3 * (last as i64 + 1)]));
        assert_eq!(all.narrow(0, 3 * rank as i64, 3), own());
    }
}

/// Each kind another number of times, for the stand-in to count, among what is not NCCL's.
fn each_kind(group: &dyn Communicator) -> Result<(), Error> {
    let own = || Tensor::ones([2, 3], (Kind::Float, Device::Cpu));
    group.barrier()?;
    for _ in 0..2 {
        group.all_reduce_sum(&mut own())?;
    }
    for _ in 0..3 {
        group.all_reduce_max(&mut own())?;
    }
    for _ in 0..4 {
        group.broadcast(&mut own(), 1)?;
    }
    for _ in 0..5 {
        let _ = group.all_gather(&own())?;
    }
    // Of as many rows as the rank says: a broadcast from each rank that has some.
    let _ = group.all_gather(&own().narrow(0, 0, group.rank() as i64))?;
    group.broadcast_bytes(&mut vec![7], 0)?;
    group.all_gather_bytes(&[7]).map(drop)
}

/// The first collective fails. Every one behind it is refused, and nobody waits in one.
fn used_behind_an_error(group: &dyn Communicator) {
    let own = || Tensor::from_slice(&[1.0_f32]);
    let first = group.all_reduce_sum(&mut own()).unwrap_err().to_string();
    assert_eq!(first, "all_reduce_sum: NCCL: a collective gives 6, a rank is gone");
    for _ in 0..2 {
        for (operation, result) in [
            ("all_reduce_sum", group.all_reduce_sum(&mut own())),
            ("all_reduce_max", group.all_reduce_max(&mut own())),
            ("broadcast", group.broadcast(&mut own(), 0)),
            ("all_gather", group.all_gather(&own()).map(drop)),
        ] {
            let message = result.unwrap_err().to_string();
            assert_eq!(message, format!("{operation}: NCCL: an error before has ended this group"));
        }
    }
}
