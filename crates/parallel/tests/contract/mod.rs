//! What every communicator promises: one body, run by threads and by processes.

use dromedary_parallel::{
    Communicator, Error, ParallelDims, WorkQueue, check_agreement, check_agreements,
};
use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Longer than two chunks of a collective, and no multiple of one.
const LONG: i64 = (20 << 20) / 4 + 3;

/// Checks all of it on one rank; panics with what is wrong.
pub(crate) fn check(world: &dyn Communicator) {
    sums_of_every_kind(world);
    maxima(world);
    layouts(world);
    long_tensors(world);
    recorded_tensors_are_refused(world);
    broadcasts(world);
    gathers(world);
    bytes(world);
    splits(world);
    grids(world);
    messages(world);
    queues(world);
    agreement(world);
    misuse_leaves_the_group_usable(world);
}

/// The sum of f(rank) over all ranks.
fn over_ranks(world: &dyn Communicator, f: impl Fn(f64) -> f64) -> f64 {
    (0..world.world_size()).map(|rank| f(rank as f64)).sum()
}

fn sums_of_every_kind(world: &dyn Communicator) {
    let want = over_ranks(world, |rank| rank + 1.0);
    for kind in [Kind::Float, Kind::Double, Kind::Int64, Kind::Half, Kind::BFloat16] {
        for size in [vec![], vec![1], vec![0], vec![3, 5], vec![2, 1, 7]] {
            let mut tensor = Tensor::ones(&size[..], FLOAT) * (world.rank() + 1) as f64;
            tensor = tensor.to_kind(kind);
            world.all_reduce_sum(&mut tensor).unwrap();
            assert_eq!((tensor.kind(), tensor.size()), (kind, size.clone()));
            assert_eq!(tensor, Tensor::full(&size[..], want, FLOAT).to_kind(kind));
        }
    }
    // Beyond what f32 and f64 can hold.
    let mut large = Tensor::from_slice(&[(1_i64 << 60) + world.rank() as i64]);
    world.all_reduce_max(&mut large).unwrap();
    assert_eq!(large.int64_value(&[0]), (1 << 60) + world.world_size() as i64 - 1);
}

/// 16-bit kinds are summed in 32 bits: 256 + 1 + 1 is 258 in bf16, but 256 in steps of bf16.
fn maxima(world: &dyn Communicator) {
    let (rank, last) = (world.rank() as f64, world.world_size() as f64 - 1.0);
    for kind in [Kind::Float, Kind::Double, Kind::Int64, Kind::Half, Kind::BFloat16] {
        let mut tensor = Tensor::from_slice(&[rank, -rank, 7.0]).to_kind(kind);
        world.all_reduce_max(&mut tensor).unwrap();
        assert_eq!(tensor, Tensor::from_slice(&[last, 0.0, 7.0]).to_kind(kind));
    }
    let own = if world.rank() == 0 { 256.0 } else { 1.0 };
    let mut tensor = Tensor::from_slice(&[own]).to_kind(Kind::BFloat16);
    world.all_reduce_sum(&mut tensor).unwrap();
    let want = Tensor::from_slice(&[256.0 + last]).to_kind(Kind::BFloat16);
    assert_eq!(tensor, want);
}

fn layouts(world: &dyn Communicator) {
    let factor = over_ranks(world, |rank| rank + 1.0);
    let base = Tensor::arange(24, FLOAT).view([4, 6]);
    let mine = || &base * (world.rank() + 1) as f64;
    let whole = mine();
    let mut part = whole.narrow(1, 2, 3);
    world.all_reduce_sum(&mut part).unwrap();
    assert_eq!(whole.narrow(1, 2, 3), base.narrow(1, 2, 3) * factor, "a view writes through");
    assert_eq!(whole.narrow(1, 0, 2), mine().narrow(1, 0, 2), "and leaves its neighbours");
    let mut turned = mine().tr();
    world.all_reduce_sum(&mut turned).unwrap();
    assert_eq!(turned, base.tr() * factor);
}

fn long_tensors(world: &dyn Communicator) {
    let base = Tensor::arange(LONG, FLOAT).remainder(1000.0);
    let mut tensor = &base * (world.rank() + 1) as f64;
    world.all_reduce_sum(&mut tensor).unwrap();
    assert_eq!(tensor, &base * over_ranks(world, |rank| rank + 1.0));
    let mut sent = if world.rank() == 0 { base.copy() } else { base.zeros_like() };
    world.broadcast(&mut sent, 0).unwrap();
    assert_eq!(sent, base);
    let all = world.all_gather(&(&base + world.rank() as f64)).unwrap();
    for rank in 0..world.world_size() {
        assert_eq!(all.narrow(0, rank as i64 * LONG, LONG), &base + rank as f64);
    }
}

fn recorded_tensors_are_refused(world: &dyn Communicator) {
    let leaf = Tensor::ones([2], FLOAT).set_requires_grad(true);
    let mut made = &leaf * 2.0;
    let refused = world.all_reduce_sum(&mut made);
    assert!(matches!(refused, Err(Error::Recorded { operation: "all_reduce_sum" })));
    assert!(matches!(world.broadcast(&mut made, 0), Err(Error::Recorded { .. })));
    let mut parameter = leaf.shallow_clone();
    world.broadcast(&mut parameter, 0).unwrap();
    assert!(parameter.requires_grad() && parameter.is_leaf());
}

fn broadcasts(world: &dyn Communicator) {
    for root in 0..world.world_size() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Uint8, Kind::Bool, Kind::Int64] {
            let value = |rank: usize| Tensor::from_slice(&[rank as i64 + 1, 0, 1]).to_kind(kind);
            let mut tensor = value(world.rank());
            world.broadcast(&mut tensor, root).unwrap();
            assert_eq!(tensor, value(root));
        }
    }
    let (root, world_size) = (world.world_size(), world.world_size());
    let message = world.broadcast(&mut Tensor::ones([1], FLOAT), root).unwrap_err().to_string();
    assert_eq!(message, format!("broadcast: root {root} is not one of {world_size} ranks"));
    assert!(world.broadcast_bytes(&mut vec![], root).is_err());
}

fn gathers(world: &dyn Communicator) {
    let ranks = world.world_size() as i64;
    let own = world.rank() as i64;
    // Rank r brings r rows of r.
    let rows = Tensor::full([own, 2], own, (Kind::Int64, Device::Cpu));
    let all = world.all_gather(&rows).unwrap();
    let want: Vec<i64> = (0..ranks).flat_map(|rank| vec![rank; rank as usize * 2]).collect();
    assert_eq!(all, Tensor::from_slice(&want).view([-1, 2]));
    let scalars = world.all_gather(&Tensor::from(own as f32)).unwrap();
    assert_eq!(scalars, Tensor::arange(ranks, FLOAT));
    let turned = Tensor::arange(6, FLOAT).view([2, 3]).tr().to_kind(Kind::BFloat16);
    let all = world.all_gather(&turned).unwrap();
    assert_eq!(all.size(), [3 * ranks, 2]);
    assert_eq!(all.narrow(0, 3 * (ranks - 1), 3), turned);
    let empty = world.all_gather(&Tensor::zeros([3, 0], FLOAT)).unwrap();
    assert_eq!(empty.size(), [3 * ranks, 0]);
}

fn bytes(world: &dyn Communicator) {
    for root in 0..world.world_size() {
        let text = |rank: usize| format!("from rank {rank}").repeat(rank).into_bytes();
        let mut own = text(world.rank());
        world.broadcast_bytes(&mut own, root).unwrap();
        assert_eq!(own, text(root));
    }
    let own = vec![world.rank() as u8; world.rank() * 3];
    let all = world.all_gather_bytes(&own).unwrap();
    let want: Vec<Vec<u8>> =
        (0..world.world_size()).map(|rank| vec![rank as u8; rank * 3]).collect();
    assert_eq!(all, want);
}

fn splits(world: &dyn Communicator) {
    world.barrier().unwrap();
    let (rank, world_size) = (world.rank(), world.world_size());
    // Even and odd ranks, numbered backwards.
    let group = world.split(rank % 2, world_size - rank).unwrap();
    let members: Vec<usize> = (0..world_size).rev().filter(|other| other % 2 == rank % 2).collect();
    assert_eq!(group.world_size(), members.len());
    assert_eq!(members[group.rank()], rank);
    let all = group.all_gather(&Tensor::from(rank as i64)).unwrap();
    let want: Vec<i64> = members.iter().map(|member| *member as i64).collect();
    assert_eq!(all, Tensor::from_slice(&want));
    // Groups do not wait for each other, and can be split again.
    if rank % 2 == 0 {
        for _ in 0..3 {
            group.barrier().unwrap();
        }
    }
    let alone = group.split(rank, 0).unwrap();
    assert_eq!((alone.rank(), alone.world_size()), (0, 1));
    let mut own = Tensor::from(rank as f32);
    alone.all_reduce_sum(&mut own).unwrap();
    assert_eq!(own, Tensor::from(rank as f32));
    world.barrier().unwrap();
}

fn grids(world: &dyn Communicator) {
    let dims = ParallelDims::new(world.world_size(), world.world_size()).unwrap();
    let group = dims.tp_group(world).unwrap();
    assert_eq!((group.rank(), group.world_size()), (world.rank(), world.world_size()));
    let replicas = dims.dp_group(world).unwrap();
    assert_eq!((replicas.rank(), replicas.world_size()), (0, 1));
    let other = ParallelDims::new(world.world_size() + 1, 1).unwrap();
    assert!(other.tp_group(world).is_err());
}

fn agreement(world: &dyn Communicator) {
    check_agreement(world, "settings", "same").unwrap();
    let values = |seed: usize| {
        vec![
            ("version".to_owned(), "1".to_owned()),
            ("seed".to_owned(), seed.to_string()),
            ("other seed".to_owned(), seed.to_string()),
        ]
    };
    check_agreements(world, &values(7)).unwrap();
    if world.world_size() > 1 {
        let result = check_agreements(world, &values(world.rank()));
        let message = result.unwrap_err().to_string();
        assert_eq!(message, "ranks disagree on seed: rank 0 has 0, rank 1 has 1");
    }
    let result = check_agreement(world, "settings", &format!("hash {}", world.rank()));
    if world.world_size() == 1 {
        return result.unwrap();
    }
    let message = result.unwrap_err().to_string();
    assert_eq!(message, "ranks disagree on settings: rank 0 has hash 0, rank 1 has hash 1");
}

/// Around the ring, two at a time, with a collective between sending and receiving.
fn messages(world: &dyn Communicator) {
    let (rank, ranks) = (world.rank(), world.world_size());
    for other in [rank, ranks] {
        assert!(matches!(world.send(other, [0, 0]), Err(Error::Peer { .. })));
        assert!(matches!(world.try_receive(other), Err(Error::Peer { .. })));
        assert!(world.receive(other).is_err());
    }
    if ranks > 1 {
        let (next, before) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
        assert_eq!(world.try_receive(before).unwrap(), None);
        world.barrier().unwrap();
        world.send(next, [rank as u64, u64::MAX]).unwrap();
        world.send(next, [rank as u64, 2]).unwrap();
        world.barrier().unwrap();
        assert_eq!(world.receive(before).unwrap(), [before as u64, u64::MAX]);
        assert_eq!(world.receive(before).unwrap(), [before as u64, 2]);
        assert_eq!(world.try_receive(before).unwrap(), None);
    }
    world.wait_for_all().unwrap();
}

fn queues(world: &dyn Communicator) {
    let ranks = world.world_size();
    for tp in (1..=ranks).filter(|tp| ranks.is_multiple_of(*tp)) {
        let dims = ParallelDims::new(ranks, tp).unwrap();
        let group = dims.tp_group(world).unwrap();
        for rows in [0, 1, 2, 97] {
            // The last group leaves before it is told that nothing is left.
            for patience in [usize::MAX, 2] {
                let leaves = dims.dp_rank(world.rank()) + 1 == dims.dp;
                let takes = if leaves { patience } else { usize::MAX };
                queue(world, group.as_ref(), rows, takes);
            }
        }
    }
}

/// Every row is given once, and the ranks of a group get the same ones.
fn queue(world: &dyn Communicator, group: &dyn Communicator, rows: usize, takes: usize) {
    let mut queue = WorkQueue::new(world, group, rows).unwrap();
    let (mut taken, mut ended) = (Vec::new(), false);
    for _ in 0..takes {
        queue.poll().unwrap();
        let block = queue.take(5).unwrap();
        ended = block.is_empty();
        if ended {
            break;
        }
        assert!(block.len() <= 5);
        taken.extend(block.map(|row| row as i64));
    }
    queue.finish().unwrap();
    let own = Tensor::from_slice(&taken);
    let all = Vec::<i64>::try_from(group.all_gather(&own).unwrap()).unwrap();
    assert_eq!(all, taken.repeat(group.world_size()));
    let all = Vec::<i64>::try_from(world.all_gather(&own).unwrap()).unwrap();
    let mut counts = vec![0; rows];
    all.iter().for_each(|row| counts[*row as usize] += 1);
    let all_ended =
        Vec::<i64>::try_from(world.all_gather(&Tensor::from(i64::from(ended))).unwrap());
    if all_ended.unwrap().iter().all(|ended| *ended == 1) {
        assert_eq!(counts, vec![group.world_size(); rows]);
    } else {
        // What the group that left had asked for ahead is lost; nothing is given twice.
        assert!(counts.iter().all(|count| [0, group.world_size()].contains(count)), "{counts:?}");
    }
}

fn misuse_leaves_the_group_usable(world: &dyn Communicator) {
    let kind = world.all_reduce_sum(&mut Tensor::ones([2], (Kind::Bool, Device::Cpu)));
    assert!(matches!(kind, Err(Error::UnsupportedKind { kind: Kind::Bool, .. })));
    assert!(world.all_reduce_max(&mut Tensor::new()).is_err());
    if world.world_size() > 1 {
        let width = if world.rank() == 0 { 2 } else { 3 };
        let rows = world.all_gather(&Tensor::ones([1, width], FLOAT));
        assert!(matches!(rows, Err(Error::Mismatch { .. })), "{rows:?}");
    }
    let mut tensor = Tensor::ones([2], FLOAT);
    world.all_reduce_sum(&mut tensor).unwrap();
    assert_eq!(tensor, Tensor::full([2], world.world_size() as f64, FLOAT));
}
