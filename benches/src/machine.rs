//! What the figures are related to: the machine's own limits.

use std::{fs, process::Command, time::Instant};

use anyhow::{Context, Result};
use dromedary_torch_ext::{PackedWeight, packing_supported};
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);
/// The product that bounds everything else: tokens, hidden size and fused FFN width of SmolLM2-135M.
const BOUND: (i64, i64, i64) = (512, 576, 3072);

/// Number of cores.
pub(crate) fn cores() -> i32 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() as i32)
}

/// GFLOP/s of the packed linear at M 512, K 576, N 3072: the bound of everything that follows.
pub(crate) fn compute_bound() -> Result<Option<f64>> {
    if !packing_supported() {
        return Ok(None);
    }
    let (m, k, n) = BOUND;
    let x = Tensor::randn([m, k], F32);
    let weight = PackedWeight::pack(&Tensor::randn([n, k], F32))?;
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        let start = Instant::now();
        for _ in 0..5 {
            let _ = weight.linear(&x)?;
        }
        best = best.min(start.elapsed().as_secs_f64() / 5.0);
    }
    Ok(Some(2.0 * (m * k * n) as f64 / best / 1e9))
}

/// This program once more, as so many processes that work as one.
pub(crate) fn on_ranks(ranks: usize) -> Result<Command> {
    let program = std::env::current_exe()?;
    if ranks == 1 {
        return Ok(Command::new(program));
    }
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n"]);
    command.arg(ranks.to_string()).arg(program);
    Ok(command)
}

/// Memory of this process in MB: now, and at its highest.
pub(crate) fn rss_mb() -> Result<(u64, u64)> {
    let status = fs::read_to_string("/proc/self/status")?;
    let field = |name: &str| -> Result<u64> {
        let line = status.lines().find(|line| line.starts_with(name)).context("no such field")?;
        let kilobytes = line.split_whitespace().nth(1).context("no value")?;
        Ok(kilobytes.parse::<u64>()? / 1000)
    };
    Ok((field("VmRSS:")?, field("VmHWM:")?))
}
