//! What more nodes bring, on paper: the time of a step from the speed of one rank and a model of the network.

use std::fmt::Write as _;

use serde::Serialize;
use tch::Kind;

use crate::{
    error::{Error, Result},
    plan::{PlanInput, PlannedRank},
    traffic::{Exchange, Group, Operation, StepShape, exchanges},
};

/// A way for data.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Link {
    /// In one direction.
    pub bytes_per_second: f64,
    /// Until the first byte is there.
    pub latency_seconds: f64,
}

/// What connects ranks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Network {
    /// Ranks of a node.
    pub ranks_per_node: usize,
    /// From a rank to the others of its node.
    pub within_node: Link,
    /// From a node to the others; the ranks of the node share it.
    pub between_nodes: Link,
}

impl Default for Network {
    /// Nodes of 8 GPUs as in a DGX A100, with one port of InfiniBand: NVLink 3 at 300 GB/s and HDR at 25 GB/s in
    /// one direction, as their makers name them, and the latencies that NCCL's choice of algorithms assumes for
    /// rings of large messages (`src/graph/tuning.cc`).
    fn default() -> Self {
        Self {
            ranks_per_node: 8,
            within_node: Link { bytes_per_second: 300e9, latency_seconds: 3.4e-6 },
            between_nodes: Link { bytes_per_second: 25e9, latency_seconds: 14e-6 },
        }
    }
}

/// A group of ranks in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    ranks: usize,
    nodes: usize,
    /// Groups of the kind that have ranks on a node, and use its link at once.
    groups_of_node: usize,
}

impl Network {
    fn place(&self, group: Group, nodes: usize, tp: usize) -> Place {
        let ranks = nodes * self.ranks_per_node;
        match group {
            Group::Tp => {
                let nodes = tp.div_ceil(self.ranks_per_node);
                Place { ranks: tp, nodes, groups_of_node: (self.ranks_per_node / tp).max(1) }
            }
            Group::Dp => {
                let ranks = ranks / tp;
                // With a model on several nodes a replica's next one is as many nodes away.
                let groups_of_node = tp.min(self.ranks_per_node);
                Place { ranks, nodes: nodes.min(ranks), groups_of_node }
            }
            Group::World => Place { ranks, nodes, groups_of_node: 1 },
        }
    }

    /// Seconds of what a group exchanges in a ring: each rank sends to the next. Large data is cut into pieces
    /// that follow each other, so a broadcast takes as long as one transfer and the way of its first piece.
    fn seconds(&self, exchange: &Exchange, place: Place) -> f64 {
        let n = place.ranks as f64;
        if place.ranks < 2 {
            return 0.0;
        }
        let link = match place.nodes {
            0 | 1 => self.within_node,
            _ => {
                let share = self.between_nodes.bytes_per_second / place.groups_of_node as f64;
                let bytes_per_second = share.min(self.within_node.bytes_per_second);
                Link { bytes_per_second, ..self.between_nodes }
            }
        };
        let (passes, hops) = match exchange.operation {
            Operation::AllReduce => (2.0 * (n - 1.0) / n, 2.0 * (n - 1.0)),
            Operation::Broadcast => (1.0, n - 1.0),
        };
        passes * exchange.bytes as f64 / link.bytes_per_second
            + exchange.calls as f64 * hops * link.latency_seconds
    }
}

/// How fast one rank is that holds the whole model, and how that is known.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rate {
    /// Tokens that it trains on in a second.
    pub tokens_per_second: f64,
    /// Where the number is from.
    pub source: String,
}

/// Rows, steps and tokens of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// Rows of the data set.
    pub rows: u64,
    /// Mean tokens of a row.
    pub row_tokens: u64,
    /// Passes over the rows.
    pub epochs: f64,
    /// Rows of a micro-batch.
    pub batch_size: u64,
    /// Micro-batches of a step of one replica.
    pub accumulation_steps: u64,
    /// Replicas that the rows of a step are for.
    pub replicas: u64,
}

impl Workload {
    /// Rows of a step.
    pub fn rows_per_step(&self) -> u64 {
        self.batch_size * self.accumulation_steps * self.replicas
    }

    /// Steps of so many rows that all passes take.
    pub fn steps(&self, rows_per_step: u64) -> u64 {
        (self.rows.div_ceil(rows_per_step.max(1)) as f64 * self.epochs).ceil() as u64
    }
}

/// What is scaled over how many nodes.
#[derive(Clone, Debug)]
pub struct ScalingInput<'a> {
    /// Model, training and ranks; `tokens` and `targets` are those of a mean micro-batch.
    pub plan: PlanInput<'a>,
    /// Kind that layers compute in.
    pub compute_kind: Kind,
    /// The moments are divided over the replicas, however many they are.
    pub shard_optimizer: bool,
    /// The run.
    pub workload: Workload,
    /// The speed of one rank.
    pub rate: Rate,
    /// What connects ranks.
    pub network: Network,
    /// Nodes at most.
    pub nodes: usize,
}

/// A number of nodes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ScalingRow {
    /// Nodes.
    pub nodes: usize,
    /// Replicas.
    pub dp: usize,
    /// Rows of a step.
    pub rows_per_step: u64,
    /// Micro-batches of the replica that has most.
    pub micro_batches: u64,
    /// Seconds of a step in which ranks compute.
    pub compute_seconds: f64,
    /// Seconds in which the ranks of a replica exchange something.
    pub tp_seconds: f64,
    /// Seconds in which replicas exchange something, flags of all ranks among it.
    pub dp_seconds: f64,
    /// Seconds of a step.
    pub step_seconds: f64,
    /// Tokens in a second, of all ranks.
    pub tokens_per_second: f64,
    /// Their share of what as many ranks give that each have a whole model and wait for nobody.
    pub efficiency: f64,
    /// Optimizer steps.
    pub steps: u64,
    /// Hours of all steps.
    pub hours: f64,
    /// What a rank exchanges in a step.
    pub exchanges: Vec<Exchange>,
}

/// Time on paper over numbers of nodes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scaling {
    /// The speed of one rank.
    pub rate: Rate,
    /// What connects ranks.
    pub network: Network,
    /// Ranks that hold one model together.
    pub tp: usize,
    /// The share of a model's work that the busiest of them has.
    pub largest_share: f64,
    /// Steps of the same rows on more nodes.
    pub same_rows: Vec<ScalingRow>,
    /// Steps whose rows grow with the nodes.
    pub more_rows: Vec<ScalingRow>,
}

impl Scaling {
    /// Powers of two of nodes, and all of them.
    ///
    /// # Errors
    /// Nodes that models of `tp` ranks do not fill, a number of ranks that the model does not have.
    pub fn new(input: &ScalingInput<'_>) -> Result<Self> {
        let ScalingInput { network, nodes, plan, workload, .. } = input;
        let (tp, per_node) = (plan.rank.tp, network.ranks_per_node);
        let fills = |nodes: usize| (nodes * per_node).is_multiple_of(tp);
        let in_groups = per_node.is_multiple_of(tp) || tp.is_multiple_of(per_node);
        if *nodes == 0 || !in_groups || !fills(*nodes) {
            return Err(Error::Setting {
                setting: "--nodes",
                message: format!(
                    "{nodes} of {per_node} ranks do not hold models of {tp} ranks each"
                ),
            });
        }
        let (tp_rank, largest_share) = busiest_rank(plan, workload.row_tokens)?;
        let rank = PlannedRank { tp_rank, ..plan.rank };
        let input = &ScalingInput { plan: PlanInput { rank, ..plan.clone() }, ..input.clone() };
        let powers = (0..usize::BITS).map(|power| 1 << power).take_while(|count| count < nodes);
        let counts: Vec<usize> = powers.filter(|&count| fills(count)).chain([*nodes]).collect();
        let rows = |micro_batches: &dyn Fn(usize) -> u64| -> Result<Vec<ScalingRow>> {
            let row = |&nodes: &usize| input.row(nodes, micro_batches(nodes), largest_share);
            counts.iter().map(row).collect()
        };
        let dp = |nodes: usize| (nodes * per_node / tp) as u64;
        Ok(Self {
            rate: input.rate.clone(),
            network: *network,
            tp,
            largest_share,
            same_rows: rows(&|_| workload.accumulation_steps * workload.replicas)?,
            more_rows: rows(&|nodes| workload.accumulation_steps * dp(nodes))?,
        })
    }
}

/// The rank that has most of a model's work in rows of `row_tokens`, and its share of it.
fn busiest_rank(plan: &PlanInput<'_>, row_tokens: u64) -> Result<(usize, f64)> {
    // A token sees half of the others on average.
    let context = row_tokens / 2;
    let work = |rank: PlannedRank| -> Result<f64> {
        Ok(rank.footprint(plan.config, plan.kind)?.work(context) as f64)
    };
    let all = work(PlannedRank { tp_rank: 0, tp: 1, ..plan.rank })?;
    let mut busiest = (0, 0.0);
    for tp_rank in 0..plan.rank.tp {
        let share = work(PlannedRank { tp_rank, ..plan.rank })? / all;
        if share > busiest.1 {
            busiest = (tp_rank, share);
        }
    }
    Ok(busiest)
}

impl ScalingInput<'_> {
    /// `nodes` nodes on which a step has `micro_batches` micro-batches.
    fn row(&self, nodes: usize, micro_batches: u64, largest_share: f64) -> Result<ScalingRow> {
        let Workload { batch_size, row_tokens, .. } = self.workload;
        let tp = self.plan.rank.tp;
        let ranks = nodes * self.network.ranks_per_node;
        let dp = ranks / tp;
        let busiest = micro_batches.div_ceil(dp as u64);
        let optimizer_shares = if self.shard_optimizer { dp } else { 1 };
        let rank = PlannedRank { optimizer_shares, ..self.plan.rank };
        let step = StepShape {
            input: &PlanInput { rank, ..self.plan.clone() },
            compute_kind: self.compute_kind,
            dp,
            micro_batches: busiest,
        };
        let exchanges = exchanges(&step)?;
        let seconds = |is_meant: &dyn Fn(Group) -> bool| -> f64 {
            let meant = exchanges.iter().filter(|exchange| is_meant(exchange.group));
            let place = |one: &Exchange| self.network.place(one.group, nodes, tp);
            // A sum of nothing would be -0.
            meant.fold(0.0, |sum, one| sum + self.network.seconds(one, place(one)))
        };
        let (tp_seconds, dp_seconds) =
            (seconds(&|group| group == Group::Tp), seconds(&|group| group != Group::Tp));
        let rate = self.rate.tokens_per_second;
        let compute_seconds = (busiest * batch_size * row_tokens) as f64 * largest_share / rate;
        let step_seconds = compute_seconds + tp_seconds + dp_seconds;
        let rows_per_step = micro_batches * batch_size;
        let tokens_per_second = (rows_per_step * row_tokens) as f64 / step_seconds;
        let steps = self.workload.steps(rows_per_step);
        Ok(ScalingRow {
            nodes,
            dp,
            rows_per_step,
            micro_batches: busiest,
            compute_seconds,
            tp_seconds,
            dp_seconds,
            step_seconds,
            tokens_per_second,
            efficiency: tokens_per_second / (rate * ranks as f64),
            steps,
            hours: steps as f64 * step_seconds / 3600.0,
            exchanges,
        })
    }
}

impl Scaling {
    /// For people: the tables, what is exchanged on all nodes, and what is assumed.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        // Writing into a string does not fail.
        for (title, rows) in [
            ("steps of the same rows on more nodes", &self.same_rows),
            ("steps whose rows grow with the nodes", &self.more_rows),
        ] {
            let _ = writeln!(text, "\n{title}");
            let _ = writeln!(
                text,
                "{:>6} {:>6} {:>9} {:>10} {:>10} {:>10} {:>10} {:>11} {:>10} {:>9}",
                "nodes",
                "dp",
                "rows",
                "step s",
                "compute s",
                "tp s",
                "dp s",
                "efficiency",
                "tokens/s",
                "hours"
            );
            for row in rows {
                let _ = writeln!(
                    text,
                    "{:>6} {:>6} {:>9} {:>10.3} {:>10.3} {:>10.3} {:>10.3} {:>9.1} % {:>10.0} {:>9.2}",
                    row.nodes,
                    row.dp,
                    row.rows_per_step,
                    row.step_seconds,
                    row.compute_seconds,
                    row.tp_seconds,
                    row.dp_seconds,
                    100.0 * row.efficiency,
                    row.tokens_per_second,
                    row.hours
                );
            }
        }
        text + &self.exchanged() + &self.assumptions()
    }

    fn exchanged(&self) -> String {
        let Some(last) = self.same_rows.last() else { return String::new() };
        let mut text = format!("\na rank exchanges in a step of {} rows\n", last.rows_per_step);
        for Exchange { group, operation, of, calls, bytes } in &last.exchanges {
            let between = match group {
                Group::Tp => "tp",
                Group::Dp => "dp",
                Group::World => "all ranks",
            };
            let how = match operation {
                Operation::AllReduce => "all-reduced",
                Operation::Broadcast => "broadcast",
            };
            let megabytes = *bytes as f64 / 1e6;
            let _ = writeln!(
                text,
                "{between:<10} {of:<18} {how:<12} {calls:>7} times {megabytes:>12.3} MB"
            );
        }
        text
    }

    fn assumptions(&self) -> String {
        let Network { ranks_per_node, within_node, between_nodes } = self.network;
        let link = |link: Link| {
            let (bandwidth, latency) = (link.bytes_per_second / 1e9, link.latency_seconds * 1e6);
            format!("{bandwidth} GB/s in one direction, {latency:.1} us a hop")
        };
        let Rate { tokens_per_second, source } = &self.rate;
        let share = 100.0 * self.largest_share;
        format!(
            "\nassumed\n\
             - one rank with the whole model trains on {tokens_per_second:.1} tokens/s: {source}\n\
             - of {tp} ranks with one model the busiest has {share:.2} % of the work, and all wait for it\n\
             - {ranks_per_node} ranks a node, each {within}; a node {between}, which the groups on it share\n\
             - rings: an all-reduce of n ranks takes 2 (n - 1) / n x bytes / bandwidth and 2 (n - 1) hops a call, \
             a broadcast bytes / bandwidth and n - 1 hops; the slowest link counts\n\
             - nothing is computed while ranks exchange something, as it is\n\
             - all rows have the mean length; every replica waits for the one with most micro-batches\n\
             - not counted: reading data, held-out rows, checkpoints, ranks slower than others, \
             time of the optimizer that the measured rate does not hold\n",
            tp = self.tp,
            within = link(within_node),
            between = link(between_nodes),
        )
    }
}
